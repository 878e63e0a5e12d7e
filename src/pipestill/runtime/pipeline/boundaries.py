"""Which rows of a batch each unit of a pipeline's step takes, and what crosses the boundaries between stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipestill.model.contracts import Contract
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.runtime.batch import Batch, microbatch_rows
from pipestill.runtime.mailbox import Forms
from pipestill.schedule import Action, Op, Role
from pipestill.schedule.pipeline.structure import PipelineStructure


@dataclass(frozen=True)
class Boundaries:
    """The units of a step (a microbatch in one view each, which an action's `microbatch` counts) and what travels of them.

    `num_trained` counts the trained parameters of each student stage, one squared norm of which clipping sends. Where
    samples have `views`, a batch's inputs are a tuple of these.
    """

    structure: PipelineStructure
    contracts: PipelineContracts
    student_stages: Sequence[range]
    teacher_stages: Sequence[range]
    num_trained: Sequence[int]
    views: bool

    def num_views(self, role: Role) -> int:
        """In how many views a model runs a microbatch."""
        return self.structure.views if role is Role.STUDENT else self.structure.teacher_views

    def view(self, action: Action) -> int:
        """The view of an action's unit."""
        assert action.microbatch is not None
        return action.microbatch % self.num_views(action.role)

    def slice_of(self, action: Action, batch: Batch) -> slice:
        """Where the rows of an action's unit are in a batch; for a loss, those of everything that it takes."""
        assert action.microbatch is not None
        if action.op is Op.LOSS and self.structure.batch_loss:
            return slice(0, batch.rows)
        views = 1 if action.op is Op.LOSS else self.num_views(action.role)
        return microbatch_rows(batch.rows, self.structure.num_microbatches)[action.microbatch // views]

    def num_rows(self, action: Action, batch: Batch) -> int:
        """How many rows of a batch an action is about."""
        rows = self.slice_of(action, batch)
        return int(rows.stop - rows.start)

    def last_unit(self, role: Role, batch: Batch) -> int:
        """The last unit of a step that has rows: there may be fewer rows than microbatches."""
        return min(self.structure.num_microbatches, batch.rows) * self.num_views(role) - 1

    def contract(self, transfer: Action, batch: Batch) -> Contract:
        """The contract of the boundary that the result of a forward or a backward crosses."""
        stage, contracts = transfer.stage - (transfer.op is not Op.FORWARD), self.contracts.at(batch.length)
        if transfer.role is Role.STUDENT:
            return contracts.student[self.view(transfer)][self.student_stages[stage][-1]]
        return contracts.teacher[self.view(transfer)][self.teacher_stages[stage][-1]]

    def forms(self, transfer: Action, batch: Batch) -> Forms:
        """The forms of the tensors that travel as the result of a forward or a backward."""
        contract, rows = self.contract(transfer, batch), self.num_rows(transfer, batch)
        return [(form, rows) for form in (contract.values if transfer.op is Op.FORWARD else contract.gradients)]
