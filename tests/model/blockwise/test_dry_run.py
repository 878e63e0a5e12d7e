"""What one tiny step of every block finds."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from support.blocks import Chain
from torch import Tensor, nn

import pipestill as ps
from pipestill.errors import ModelError
from pipestill.model.blockwise.dry_run import blockwise_dry_run


def chain(*widths: int) -> Chain:
    return Chain([nn.Linear(a, b) for a, b in pairwise(widths)])


@pytest.mark.parametrize(
    ("student", "more", "message"),
    [
        (
            chain(4, 3, 4),
            {},
            r"student block 0 \('b0'\) cannot take float32\[2, 4\] and be compared with float32\[2, 5\].*projectors",
        ),
        (chain(3, 5, 4), {}, r"student block 0 \('b0'\) cannot take .*give projectors"),
        (chain(4, 5, 4), {"loss": lambda s, t: s}, "the loss of block 0 gave a tensor of shape .* expected a scalar"),
        (chain(4, 5, 4), {"loss": lambda s, t: t.sum()}, "the loss of block 0 does not depend on any trained parameter"),
    ],
)
def test_blocks_that_do_not_fit_are_named(student: Chain, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        blockwise_dry_run(ps.Blockwise(chain(4, 5, 4), student, **more), torch.randn(3, 4))


def test_boundary_without_rows_is_refused() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(0)

    with pytest.raises(ModelError, match=r"teacher block 0 \('b0'\) gives .* give tensors of one row a sample"):
        blockwise_dry_run(ps.Blockwise(Chain([Sum()]), chain(4, 4)), torch.randn(3, 4))


def test_writes_in_place_and_forms_are_found_without_a_trace() -> None:
    """Of all blocks, the second of each model writes to its input; contracts are those of any number of rows."""
    models = [
        Chain([nn.Linear(4, 5), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 4))]),
        Chain([nn.Linear(4, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 4))]),
    ]
    task = ps.Blockwise(*models)
    contracts = blockwise_dry_run(task, torch.randn(3, 4))
    assert (contracts.teacher_writes, contracts.student_writes) == ({1}, set())
    assert contracts.before(0).values[0].shape_of(7) == (7, 4)
    assert contracts.before(1).values[0].shape_of(7) == (7, 5)
    assert all(parameter.grad is None for parameter in task.student.parameters())
    assert blockwise_dry_run(ps.Blockwise(models[1], models[0]), torch.randn(3, 4)).student_writes == {1}
