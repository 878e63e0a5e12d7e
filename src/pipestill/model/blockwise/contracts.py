"""The contracts of what crosses between blocks that are trained alone."""

from __future__ import annotations

from dataclasses import dataclass

from pipestill.model.contracts import Contract


@dataclass(frozen=True)
class BlockwiseContracts:
    """What crosses between blocks: the samples' contract, and that of what each teacher block gives.

    `teacher_writes` and `student_writes` hold the blocks that write to their input in place; these get a copy of it.
    """

    inputs: Contract
    outputs: tuple[Contract, ...]
    teacher_writes: frozenset[int]
    student_writes: frozenset[int]

    def before(self, block: int) -> Contract:
        """Of what a block gets."""
        return self.outputs[block - 1] if block else self.inputs
