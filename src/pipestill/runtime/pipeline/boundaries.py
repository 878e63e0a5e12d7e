"""What travels between the stages of a pipeline, and how many rows of a batch each action is about."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipestill.model.contracts import Contract
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.runtime.batch import Batch, microbatch_rows
from pipestill.runtime.mailbox import Forms
from pipestill.runtime.pipeline.features import Taught
from pipestill.schedule import Action, Op, Role
from pipestill.schedule.pipeline.structure import PipelineStructure


@dataclass(frozen=True)
class Boundaries:
    """The units of a step (a microbatch in one view each, which an action's `microbatch` counts) and what travels of them.

    `num_trained` counts the trained parameters of each student stage, one squared norm of which clipping sends. Where
    samples have `views`, a batch's inputs are a tuple of these. `taps` holds, for each of the structure's features, the number
    of the teacher's tensor that it takes. `tied` holds, for each student stage, shape and type of its gradients of tied weights.
    """

    structure: PipelineStructure
    contracts: PipelineContracts
    student_stages: Sequence[range]
    teacher_stages: Sequence[range]
    num_trained: Sequence[int]
    views: bool
    taps: Sequence[int] = ()
    tied: Sequence[Sequence[tuple[torch.Size, torch.dtype]]] = ()

    def num_views(self, role: Role) -> int:
        """In how many views a model runs a microbatch."""
        return self.structure.views if role is Role.STUDENT else self.structure.teacher_views

    def view(self, action: Action) -> int:
        """The view of an action's unit."""
        return unit_of(action) % self.num_views(action.role)

    def slice_of(self, action: Action, batch: Batch) -> slice:
        """Where the rows of an action's unit are in a batch; for a loss, those of everything that it takes."""
        if action.op is Op.LOSS and self.structure.batch_loss:
            return slice(0, batch.rows)
        views = 1 if action.op is Op.LOSS else self.num_views(action.role)
        return microbatch_rows(batch.rows, self.structure.num_microbatches)[unit_of(action) // views]

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

    def forms(self, transfer: Action, batch: Batch, destination: int) -> Forms:
        """The forms of the tensors that travel to a rank as the result of a forward or a backward."""
        rows = self.num_rows(transfer, batch)
        if transfer.role is Role.STUDENT:
            contract = self.contract(transfer, batch)
            return [(form, rows) for form in (contract.values if transfer.op is Op.FORWARD else contract.gradients)]
        return [(form, rows) for contract in self._parts(transfer, batch, destination) for form in contract.values]

    def _parts(self, transfer: Action, batch: Batch, destination: int) -> list[Contract]:
        """The contracts of what a rank takes of a teacher's forward: of its output where it does, then of its features."""
        passed = self.structure.passes_output(transfer.stage, destination)
        taps = self.contracts.at(batch.length).taps
        output = [self.contract(transfer, batch)] if passed else []
        return [*output, *(taps[number] for number in self._taken(transfer, destination))]

    def _taken(self, transfer: Action, destination: int) -> list[int]:
        """The teacher's tensors that features of a rank take of a teacher's forward."""
        return sorted({self.taps[number] for number in self.structure.features_to(transfer.stage, destination)})

    def split_taught(self, transfer: Action, batch: Batch, destination: int, taught: Taught) -> list[Tensor]:
        """List the tensors of a teacher's forward that a rank takes."""
        passed = self.structure.passes_output(transfer.stage, destination)
        values = [*([taught.output] if passed else []), *(taught.taken[number] for number in self._taken(transfer, destination))]
        pairs = zip(self._parts(transfer, batch, destination), values, strict=True)
        return [tensor for contract, value in pairs for tensor in contract.split(value, self.num_rows(transfer, batch))]

    def join_taught(self, transfer: Action, batch: Batch, destination: int, tensors: Sequence[Tensor]) -> Taught:
        """What a rank takes of a teacher's forward, from its tensors: the inverse of `split_taught`."""
        given, values = iter(tensors), []
        for contract in self._parts(transfer, batch, destination):
            values.append(contract.join([next(given) for _ in contract.values], self.num_rows(transfer, batch)))
        output = values.pop(0) if self.structure.passes_output(transfer.stage, destination) else None
        return Taught(output, dict(zip(self._taken(transfer, destination), values, strict=True)))


def unit_of(action: Action) -> int:
    """The unit of a work that has one."""
    assert action.microbatch is not None
    return action.microbatch
