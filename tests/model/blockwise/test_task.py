"""Tasks of blockwise distillation, and one block's forward, loss and backward."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from support.blocks import Chain
from torch import Tensor, nn

import pipestill as ps
from pipestill.errors import ModelError
from pipestill.model.blockwise.task import teacher_output, train_block


def chain(*widths: int) -> Chain:
    return Chain([nn.Linear(a, b) for a, b in pairwise(widths)])


def test_numbers_of_blocks_that_differ() -> None:
    with pytest.raises(ModelError, match="the student has 2 blocks, the teacher 3; cut both into as many"):
        ps.Blockwise(chain(4, 4, 4, 4), chain(4, 4, 4))


def test_everything_wrong_with_a_task_is_told_at_once() -> None:
    with pytest.raises(ModelError) as error:
        ps.Blockwise(chain(4, 4, 4), chain(4, 4, 4), loss=[ps.losses.mse], output_projectors={5: nn.Linear(1, 1)})
    assert "1 losses for 2 blocks" in str(error.value)
    assert "output_projectors of block 5; there are blocks 0 to 1" in str(error.value)


def test_shared_parameter_is_refused() -> None:
    teacher, student = chain(4, 4), chain(4, 4)
    student.b0.weight = teacher.b0.weight  # type: ignore[assignment]
    with pytest.raises(ModelError, match="share a parameter or buffer"):
        ps.Blockwise(teacher, student)


def test_weight_tied_between_student_blocks_is_refused() -> None:
    student = chain(4, 4, 4)
    student.b1.weight = student.b0.weight  # type: ignore[assignment]
    with pytest.raises(ModelError, match="shared by student stages 0 and 1"):
        ps.Blockwise(chain(4, 4, 4), student)


CPU = torch.device("cpu")


class Noise(nn.Module):
    """Adds random numbers, and keeps the number of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(ps.batch_number())
        return self.scale * (x + torch.rand(x.shape))


def task(**more: Any) -> ps.Blockwise:
    torch.manual_seed(0)
    return ps.Blockwise(Chain([nn.Linear(4, 4)]).double(), Chain([nn.Linear(4, 4)]).double(), **more)


def trained(of: ps.Blockwise, value: Tensor, weight: float, unit: int = 0, batch: int = 0) -> Tensor:
    target = teacher_output(of, 0, value)
    return train_block(of, 0, value, target, weight, seed=1, batch=batch, unit=unit, device=CPU)


def test_weighted_parts_of_a_batch_add_up_to_the_whole() -> None:
    whole, parts, value = task(), task(), torch.randn(7, 4).double()
    loss = trained(whole, value, 1.0)
    total = trained(parts, value[:5], 5 / 7) + trained(parts, value[5:], 2 / 7)
    assert total.item() == pytest.approx(loss.item())
    assert not loss.requires_grad
    for one, other in zip(whole.student.parameters(), parts.student.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_teacher_has_no_graph() -> None:
    assert not teacher_output(task(), 0, torch.randn(2, 4).double()).requires_grad


def test_candidates_are_trained_beside_the_block_with_random_numbers_of_their_own() -> None:
    """The same for a batch and a unit, others for any other; a candidate draws what the block does not."""
    of = task(candidates={0: [Noise(), Noise()]})
    value = torch.randn(3, 4).double()
    first, again, other = (trained(of, value, 1.0, unit).item() for unit in (0, 0, 1))
    assert first == again != other
    assert all(parameter.grad is not None for parameter in of.parameters_of(0).values())
    one, two = of.candidates[0]
    assert one.scale.grad != two.scale.grad


def test_blocks_know_the_number_of_the_batch() -> None:
    of = task(candidates={0: [Noise()]})
    for batch in (4, 9):
        trained(of, torch.randn(3, 4).double(), 1.0, batch=batch)
    assert of.candidates[0][0].batches == [4, 9]


def test_a_block_without_parameters_has_a_loss_all_the_same() -> None:
    of = ps.Blockwise(Chain([nn.Linear(4, 4), nn.ReLU()]), Chain([nn.Linear(4, 4), nn.Tanh()]))
    value = torch.randn(3, 4)
    assert train_block(of, 1, value, value, 1.0, seed=0, batch=0, unit=0, device=CPU) > 0
