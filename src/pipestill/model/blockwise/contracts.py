"""The contracts of what crosses between blocks that are trained alone."""

from __future__ import annotations

from dataclasses import dataclass

from pipestill.model.contracts import Contract


@dataclass(frozen=True)
class BlockwiseContracts:
    """The contracts of a task: of a batch's inputs, and of the output of each teacher block."""

    inputs: Contract
    outputs: tuple[Contract, ...]
    teacher_writes: frozenset[int]
    """The teacher blocks that write to their input in place; they are given a copy of it."""
    student_writes: frozenset[int]
    """The student blocks that do, likewise."""

    def before(self, block: int) -> Contract:
        """The contract of the input of one block."""
        return self.outputs[block - 1] if block else self.inputs
