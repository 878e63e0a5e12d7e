"""The contracts of all boundaries of a pipeline, for batches of any number of rows and any length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from pipestill.model.contracts import Contract
from pipestill.model.lengths import ContractByLength


@dataclass(frozen=True)
class PipelineContracts:
    """The contracts of a task: of a batch's inputs and targets, and of every boundary between blocks, in every view."""

    inputs: Contract
    targets: Contract
    student: tuple[tuple[Contract, ...], ...]
    """By view, then by block: the value after each student block."""
    teacher: tuple[tuple[Contract, ...], ...]
    """By view that the teacher sees, then by block: the value after each teacher block."""
    loss_parts: tuple[str, ...]
    """The names under which the loss returns its parts, in its order."""
    copies: frozenset[int]
    """Student blocks whose input is written to in place, by themselves or by a later block. Where block 0 is among them, it
    gets a copy of its rows: microbatches are slices of one batch, and autograd counts writes to the batch as a whole."""
    unsplit: Mapping[int, str] = field(default_factory=dict)
    """Student blocks whose backward cannot be taken in two halves, and why."""
    by_length: PipelineContractsByLength | None = field(default=None, repr=False)
    """The contracts of batches of any length; None where batches do not differ in length."""

    def at(self, length: int) -> PipelineContracts:
        """The contracts for batches of that length; the same at any length where batches do not differ in it."""
        return self if self.by_length is None else self.by_length.at(length)


class PipelineContractsByLength:
    """The contracts of a task for batches of any length, from its contracts at three lengths."""

    def __init__(self, lengths: tuple[int, int, int], contracts: Sequence[PipelineContracts]) -> None:
        self.longest = contracts[-1]

        def joined(found: Sequence[Contract]) -> ContractByLength:
            one, two, three = found
            return ContractByLength(lengths, (one, two, three))

        def nested(found: Sequence[tuple[tuple[Contract, ...], ...]]) -> tuple[tuple[ContractByLength, ...], ...]:
            views = zip(*found, strict=True)
            return tuple(tuple(joined(same) for same in zip(*view, strict=True)) for view in views)

        self.inputs = joined([c.inputs for c in contracts])
        self.targets = joined([c.targets for c in contracts])
        self.student = nested([c.student for c in contracts])
        self.teacher = nested([c.teacher for c in contracts])
        self.at = lru_cache(maxsize=256)(self._at)

    def _at(self, length: int) -> PipelineContracts:
        """Compute the contracts for batches of that length."""
        return replace(
            self.longest,
            inputs=self.inputs.at(length),
            targets=self.targets.at(length),
            student=tuple(tuple(block.at(length) for block in view) for view in self.student),
            teacher=tuple(tuple(block.at(length) for block in view) for view in self.teacher),
        )
