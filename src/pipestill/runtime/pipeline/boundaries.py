"""What crosses the boundaries between the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipestill.model.contracts import Contract
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.tensor_form import TensorForm
from pipestill.schedule import Action, Op, Role


@dataclass(frozen=True)
class Boundaries:
    """The contracts of both models' blocks, and after which of these a stage ends.

    `num_trained` counts the trained parameters of each student stage, one squared norm of which clipping sends. Where
    samples have `views`, a batch's inputs are a tuple of these.
    """

    contracts: PipelineContracts
    student_stages: Sequence[range]
    teacher_stages: Sequence[range]
    num_trained: Sequence[int]
    views: bool

    def contract(self, transfer: Action, view: int, length: int) -> Contract:
        """The contract of the boundary that the result of a forward or a backward crosses, in one view and at one length."""
        stage = transfer.stage if transfer.op is Op.FORWARD else transfer.stage - 1
        contracts = self.contracts.at(length)
        if transfer.role is Role.STUDENT:
            return contracts.student[view][self.student_stages[stage][-1]]
        return contracts.teacher[view][self.teacher_stages[stage][-1]]

    def forms(self, transfer: Action, view: int, length: int) -> list[TensorForm]:
        """The forms of the tensors that travel as the result of a forward or a backward."""
        contract = self.contract(transfer, view, length)
        return contract.values if transfer.op is Op.FORWARD else contract.gradients
