"""Several teachers as one model, whose blocks are those of the teachers, one teacher after the other.

Such a model is partitioned, planned and run like any other. What passes between two of its blocks is what passes between those
of a teacher, and beside it the batch's inputs, for the teachers that are still to run, and the outputs of those that are done.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from pipestill.errors import ModelError
from pipestill.model.block import Block
from pipestill.model.blocks import BlockModel


class Progress(NamedTuple):
    """How far several teachers have come with some rows."""

    inputs: Any
    """The batch's inputs; None once the last teacher has begun."""
    outputs: tuple[Any, ...]
    """The outputs of the teachers that are done."""
    value: Any
    """The value after a block of the teacher that runs; None between two teachers."""


class Teachers(nn.Module):
    """Several teachers that run one after the other."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, inputs: Any) -> Progress:
        """Run all teachers."""
        return Progress(None, tuple(model(inputs) for model in self.models), None)


def teachers_blocks(models: Sequence[nn.Module], cuts: Sequence[Any] | None) -> BlockModel:
    """The blocks of several teachers, named `0.NAME` for those of the first, and so on; `cuts` are those of each teacher."""
    if cuts is not None and len(cuts) != len(models):
        raise ModelError(f"there are {len(models)} teachers and {len(cuts)} teacher_cuts; give a list of cuts, or None, for each")
    blocks = []
    for number, model in enumerate(models):
        cut = BlockModel(model, cuts[number] if cuts is not None else None).blocks
        for i, block in enumerate(cut):
            uses = tuple(f"models.{number}.{use}".rstrip(".") for use in block.uses)
            call = partial(_call, block.call, i == 0, i == len(cut) - 1, number == len(models) - 1)
            blocks.append(Block(f"{number}.{block.name}", call, uses))
    return BlockModel(Teachers(models), blocks)


def _call(call: Any, first: bool, last: bool, last_teacher: bool, given: Any) -> Progress:
    """Run one teacher's block, which may be its first or its last one."""
    inputs, outputs, value = given if isinstance(given, Progress) else (given, (), None)
    value = call(inputs if first else value)
    return Progress(None if last_teacher else inputs, (*outputs, value) if last else outputs, None if last else value)


def value_after(value: Any) -> Any:
    """The value after a block as the block itself gave it, be it one of several teachers or not."""
    if not isinstance(value, Progress):
        return value
    return value.outputs[-1] if value.value is None else value.value
