"""Blocks that do other work than their model, or train what they do not name."""

import pytest
import torch
from support.models import CLASSES
from torch import nn

import pipestill as ps
from pipestill.errors import ModelError
from pipestill.model.dry_run import dry_run

X, Y = torch.randn(3, 4), torch.tensor([0, 1, 2])


def test_a_block_names_all_that_it_trains() -> None:
    """Otherwise another rank would train a copy that nobody ever sees."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.scale = nn.Linear(4, 8), nn.Linear(8, CLASSES), nn.Parameter(torch.ones(8))

        def pipeline_blocks(self) -> list[ps.Block]:
            return [
                ps.Block("first", lambda x: self.first(x) * self.scale, ("first", "scale")),
                ps.Block("last", lambda x: self.last(x * self.scale), ("last",)),
            ]

    task = ps.Supervised(Model(), ps.losses.cross_entropy)
    with pytest.raises(
        ModelError, match=r"student block 1 \('last'\) trains 'scale' without naming them in its `uses`"
    ):
        dry_run(task, X, Y)
    task.student.scale.requires_grad_(False)
    dry_run(task, X, Y)  # what nobody trains is the same in every copy


class _ForwardDoesMore(nn.Module):
    """Its forward has a ReLU that no block has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def pipeline_blocks(self) -> list[str]:
        return ["first", "second"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_work_that_only_the_forward_does_is_not_dropped_in_silence() -> None:
    task = ps.Supervised(_ForwardDoesMore(), lambda output, target: output.square().mean())
    with pytest.raises(ModelError, match=r"do not give what _ForwardDoesMore.forward gives"):
        dry_run(task, torch.randn(4, 3), None)
