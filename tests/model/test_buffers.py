"""Buffers that several blocks use: those that a forward writes may not be in two stages, all others may."""

from typing import Any

import pytest
import torch
from support.cases import Call, distilled, linears, supervised
from support.fits import unit_costs
from support.models import CLASSES, vectors
from torch import Tensor, nn

import pipestill as ps
from pipestill.errors import ModelError
from pipestill.model.blocks import BlockModel, ranges
from pipestill.model.buffers import SharedBuffer
from pipestill.model.dry_run import dry_run

X, Y = vectors((6,))[0]


class Counts(nn.Module):
    def __init__(self, replaces: bool) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.replaces = replaces

    def forward(self, x: Tensor) -> Tensor:
        if self.replaces:
            self.seen = self.seen + 1
        else:
            self.seen += 1
        return x


def scaled(replaces: bool = False) -> ps.Supervised:
    """Block 1 counts its forwards, and block 3 reads the number through a function that knows it."""
    counts = Counts(replaces)
    task = supervised(
        nn.Linear(4, 8), counts, nn.Linear(8, 8), Call(lambda self, x: x * self.known[0].seen), nn.Linear(8, CLASSES)
    )
    task.student[3].known = [counts]  # a list, so that it is no submodule
    return task


@pytest.mark.parametrize("replaces", [False, True])
def test_buffer_of_one_block_read_by_another_is_not_stale_in_silence(replaces: bool) -> None:
    task = scaled(replaces)
    assert dry_run(task, X, Y).shared_buffers == (SharedBuffer("student", "1.seen", 1, 3),)

    def fit(partition: list[int]) -> None:
        task = scaled(replaces)
        costs = unit_costs(task)
        ps.Trainer(task, costs=costs, devices=2, device="cpu", microbatches=2, student_partition=partition).fit([(X, Y)])

    with pytest.raises(ModelError, match=r"'1.seen' is written by student block 1 \('1'\) and used by block 3 .* stages 0 and 1"):
        fit([2, 3])
    fit([1, 4])


def test_buffer_that_travels_as_a_value_is_allowed() -> None:
    class Gives(Counts):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.seen

    task = supervised(nn.Linear(4, 8), Gives(False), Call(lambda self, v: v[0] * v[1]), nn.Linear(8, CLASSES))
    assert dry_run(task, X, Y).shared_buffers == ()


def test_shared_batch_norm_is_found_under_both_blocks() -> None:
    norm = nn.BatchNorm1d(8, affine=False)
    task = supervised(nn.Linear(4, 8), norm, nn.Linear(8, 8), norm, nn.Linear(8, CLASSES))
    found = dry_run(task, X, Y).shared_buffers
    assert {(one.name, one.writer, one.user) for one in found} >= {("1.running_mean", 1, 3), ("1.running_mean", 3, 1)}


class Angles(nn.Module):
    """A layer that turns its input by angles which all layers share, as rotary embeddings do."""

    def __init__(self, angles: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("angles", angles)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.angles.cos()


def turned() -> ps.Distillation:
    """Layers that share a buffer, and a frozen weight at both ends."""
    torch.manual_seed(3)
    angles = torch.arange(8.0)
    task = distilled(nn.Linear(4, 8), Angles(angles), Angles(angles), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES))
    task.student[4].weight = task.student[3].weight.requires_grad_(False)
    return task


def test_rotary_buffer_and_frozen_tied_weight_may_be_in_two_stages() -> None:
    def trained(**options: Any) -> dict[str, Tensor]:
        task = turned()
        ps.Trainer(task, device="cpu", microbatches=2, **options).fit(vectors())
        return dict(task.student.state_dict())

    expected = trained(strategy="reference")
    for partition in ([2, 4], [4, 2]):
        got = trained(costs=unit_costs(turned()), devices=2, student_partition=partition)
        assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_trained_tie_is_still_refused_where_another_block_freezes_nothing() -> None:
    blocks = BlockModel(nn.Sequential(*linears(4, 4, 4)))
    blocks.model[1].weight = blocks.model[0].weight
    with pytest.raises(ModelError, match="tied weights cannot be trained in two stages"):
        BlockModel(blocks.model).check_ties(ranges((1, 1)))


def test_blocks_trained_alone_share_no_buffer_that_changes() -> None:
    norm = nn.BatchNorm1d(4, affine=False)

    def block(buffer: Tensor | None, part: nn.Module) -> nn.Module:
        class Alone(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.part = nn.Linear(4, 4), part
                self.register_buffer("angles", buffer)

            def forward(self, x: Tensor) -> Tensor:
                return self.part(self.layer(x))

        return Alone()

    def fit(parts: list[nn.Module]) -> None:
        angles = torch.zeros(4)
        student = nn.Sequential(*(block(angles, part) for part in parts))
        task = ps.Blockwise(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), student)
        ps.Trainer(task, device="cpu", strategy="reference").fit([torch.randn(6, 4)])

    fit([nn.Identity(), nn.Identity()])
    with pytest.raises(
        ModelError, match=r"buffer '0.part.num_batches_tracked' is written by student block 0 \('0'\) and is part of"
    ):
        fit([norm, norm])
