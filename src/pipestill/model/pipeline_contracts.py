"""The contracts of all boundaries of a pipeline, for batches of any number of rows and any length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from pipestill.model.contracts import Contract
from pipestill.model.lengths import AtLength


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
    """The contracts of a task for batches of any length, from its contracts at three lengths, the longest last.

    Raises `ModelError` where these differ in more than their numbers.
    """

    def __init__(self, lengths: tuple[int, int, int], contracts: Sequence[PipelineContracts]) -> None:
        self.lengths = lengths
        self.contracts = contracts
        self.at = lru_cache(maxsize=256)(self._at)
        self.at(lengths[0])

    def _at(self, length: int) -> PipelineContracts:
        """Derive the contracts for batches of that length."""
        at = AtLength(self.lengths, length)

        def derived(views: Sequence[tuple[tuple[Contract, ...], ...]]) -> tuple[tuple[Contract, ...], ...]:
            same_view = zip(*views, strict=True)
            return tuple(tuple(at.contract(same) for same in zip(*blocks, strict=True)) for blocks in same_view)

        return replace(
            self.contracts[-1],
            inputs=at.contract([c.inputs for c in self.contracts]),
            targets=at.contract([c.targets for c in self.contracts]),
            student=derived([c.student for c in self.contracts]),
            teacher=derived([c.teacher for c in self.contracts]),
        )
