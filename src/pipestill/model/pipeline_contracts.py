"""The contracts of everything that crosses boundaries in a pipeline, for batches of any number of rows and any length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from pipestill.model.contracts import Contract
from pipestill.model.lengths import ContractByLength


@dataclass(frozen=True)
class PipelineContracts:
    """Every contract of a task: what crosses after each block in each view, and what a batch is made of.

    `copies` holds the student blocks whose input is written to in place, by themselves or by a block after them. The
    first one gets a copy of its rows then: microbatches are parts of one batch, and autograd looks after it as a whole.
    `unsplit` says of blocks whose backward cannot be taken in two halves why not.
    """

    inputs: Contract
    targets: Contract
    student: tuple[tuple[Contract, ...], ...]
    teacher: tuple[tuple[Contract, ...], ...]
    loss_parts: tuple[str, ...]
    copies: frozenset[int]
    unsplit: Mapping[int, str] = field(default_factory=dict)
    by_length: PipelineContractsByLength | None = field(default=None, repr=False)

    def at(self, length: int) -> PipelineContracts:
        """The contracts of batches of that length, where batches differ in it."""
        return self if self.by_length is None else self.by_length.at(length)


class PipelineContractsByLength:
    """A task's contracts at any length, from those at three."""

    def __init__(self, lengths: tuple[int, int, int], contracts: Sequence[PipelineContracts]) -> None:
        self.longest = contracts[-1]

        def family(found: Sequence[Contract]) -> ContractByLength:
            one, two, three = found
            return ContractByLength(lengths, (one, two, three))

        def nested(found: Sequence[tuple[tuple[Contract, ...], ...]]) -> tuple[tuple[ContractByLength, ...], ...]:
            views = zip(*found, strict=True)
            return tuple(tuple(family(same) for same in zip(*view, strict=True)) for view in views)

        self.inputs, self.targets = family([c.inputs for c in contracts]), family([c.targets for c in contracts])
        self.student, self.teacher = nested([c.student for c in contracts]), nested([c.teacher for c in contracts])
        self.at = lru_cache(maxsize=256)(self._at)

    def _at(self, length: int) -> PipelineContracts:
        student, teacher = (
            tuple(tuple(block.at(length) for block in view) for view in views) for views in (self.student, self.teacher)
        )
        return replace(
            self.longest,
            inputs=self.inputs.at(length),
            targets=self.targets.at(length),
            student=student,
            teacher=teacher,
        )
