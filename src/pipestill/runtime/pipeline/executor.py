"""Runs one rank's row of a pipeline schedule.

The row is walked as a generator that yields whenever it has to wait, so the same code runs alone in its process
(where the transport itself waits) and interleaved with the other ranks in one process.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, repeat
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipestill.model.nests import copied, rows_of, to_device
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.runtime.batch import HEADER_LENGTH, Batch
from pipestill.runtime.mailbox import Forms, Mailbox, StepData
from pipestill.runtime.pipeline.boundaries import Boundaries, unit_of
from pipestill.runtime.pipeline.features import Taught
from pipestill.runtime.pipeline.stage import gradient_squares, guard_batch
from pipestill.runtime.record import Recorder
from pipestill.runtime.transport.message import Message
from pipestill.runtime.transport.protocol import Transport, Waiting
from pipestill.schedule import Action, Kind, Lane, Op, Role, Schedule
from pipestill.schedule.pipeline.structure import PipelineStructure
from pipestill.schedule.structure import needs


class Student(Protocol):
    """What an executor asks of a stage of the student (see `StudentStage`)."""

    @property
    def counted(self) -> Sequence[nn.Parameter]: ...
    def enter(self, tensors: Sequence[Tensor], rows: int, unit: int, length: int) -> tuple[Any, list[Tensor | None]]: ...
    def forward(self, value: Any, gradients: list[Tensor | None], step: int, unit: int, rows: int, length: int) -> Any: ...
    def infer(self, value: Any, step: int, unit: int) -> Any: ...
    def end_batch(self) -> None: ...
    def loss(
        self, number: int, outputs: Mapping[int, Any], teacher: Mapping[int, Any], target: Any, step: int,
        factors: Sequence[float],
    ) -> None: ...  # fmt: skip
    def feature_losses(
        self, number: int, units: Sequence[int], taught: Sequence[Mapping[int, Tensor]], target: Any, step: int,
        factors: Callable[[Sequence[str]], Sequence[float]],
    ) -> None: ...  # fmt: skip
    def backward(self, gradients: Sequence[Tensor] | None, step: int, unit: int) -> list[Tensor]: ...
    def weight_gradients(self, step: int, unit: int) -> None: ...
    def tied_gradients(self) -> list[Tensor]: ...
    def add_up_tied(self, gradients: Mapping[range, Sequence[Tensor]]) -> None: ...
    def clip(self, squares: Tensor, largest: float) -> None: ...
    def update(self, step: int) -> None: ...


class Teacher(Protocol):
    """What an executor asks of a stage of the teacher (see `TeacherStage`)."""

    def forward(self, value: Any, step: int, unit: int) -> Taught: ...
    def end_batch(self) -> None: ...
    def note(self) -> None: ...
    def follow(self, step: int) -> None: ...


@dataclass(eq=False)
class PipelineExecutor:
    """Runs one rank's row over all batches of one segment: training, or a validation.

    `source` gives the batches on the rank that reads them, and is None elsewhere. In training, gradients are scaled down to
    `largest_norm` where the schedule clips them. `before_update(step, batch)` runs before an update, `after_update(step, batch)`
    after it, where the step is over for this rank: the place for logs and validations.
    `metric(output, target, rows)` is called on the last stage of a forward-only schedule instead of the loss.
    """

    schedule: Schedule[PipelineStructure]
    rank: int
    boundaries: Boundaries
    student: Student
    teacher: Teacher | None
    transport: Transport
    recorder: Recorder
    source: Iterator[Batch] | None
    largest_norm: float | None = None
    before_update: Callable[[int, Batch], None] | None = None
    after_update: Callable[[int, Batch], Waiting] | None = None
    metric: Callable[[Any, Any, int], None] | None = None
    segment: int = 0

    def __post_init__(self) -> None:
        self.structure = self.schedule.structure
        self.mailbox = Mailbox(
            self.schedule, self.rank, self.transport, device=self.recorder.device, local_uses=self._local_uses,
            segment=self.segment,
        )  # fmt: skip
        counted = self.boundaries.contracts.counted if self.structure.train else ()
        end = Batch(0, 0, True, counts=dict.fromkeys(counted, 0.0))
        endless = chain(self.source, repeat(end)) if self.source is not None else None
        self.batches = StepData(self.mailbox, endless, _BatchTravel(self.boundaries.contracts, counted))

    def run(self) -> Waiting:
        """Run every period of the schedule, from the first batch to the last."""
        for period in count(-self.schedule.lookahead):
            if period >= 0:
                batch = yield from self.batches.get(period)
                if batch.ended:
                    break
            row = [a.at(period + a.step) for a in self.schedule.rows[self.rank] if period + a.step >= 0]
            if period >= 0 and batch.last and self.structure.train:
                row = _with_update_first(row, period)
            for action in row:
                yield from self._do(action)
            self.batches.forget(period)
        self.mailbox.flush()

    def _local_uses(self, work: Action) -> list[Action]:
        """The results that a work uses and this rank keeps: outputs for a loss, squared norms of gradients for an update.

        What another rank's teacher gives is kept too, for several works may use it.
        """
        used = [need for need in needs(work, self.structure) if need.op in (Op.FORWARD, Op.NORM)]
        kept = [need for need in used if work.op in (Op.LOSS, Op.UPDATE) and self.structure.rank_of(need) == self.rank]
        return [*kept, *self._taught_elsewhere(work)]

    def _taught_elsewhere(self, work: Action) -> list[Action]:
        """The forwards of the teacher on other ranks whose results come here and that a work uses, or comes after."""
        forwards = [need for need in needs(work, self.structure) if need.role is Role.TEACHER and need.op is Op.FORWARD]
        others = [need for need in forwards if self.structure.rank_of(need) != self.rank]
        return [need for need in others if self.structure.lane(need, self.rank) is Lane.TEACHER]

    # -- one action -------------------------------------------------------------------------------------------------

    def _do(self, action: Action) -> Waiting:
        """Do one action, unless its batch has ended before it, or its microbatch has no rows."""
        if action.op is Op.DATA:
            self.batches.do(action)
            return
        batch = yield from self.batches.get(action.step)
        if batch.ended or (action.op.per_microbatch and not self.boundaries.num_rows(action, batch)):
            return
        if action.computes:
            yield from self.mailbox.wait_for_tokens(action)
            yield from self._compute(action, batch)
        elif not self.mailbox.transfer_token(action):
            if action.kind is Kind.SEND:
                self._send(action, batch)
            else:
                self._post(action, batch)

    def _compute(self, action: Action, batch: Batch) -> Waiting:
        """Do the work of an action, once everything that it comes after is done."""
        if action.op is Op.FORWARD:
            yield from self._forward(action, batch)
        elif action.op is Op.LOSS:
            yield from self._loss(action, batch)
        elif action.op in (Op.BACKWARD, Op.INPUT):
            yield from self._backward(action, batch)
        elif action.op is Op.WEIGHT:
            with self.recorder.working(action):
                self.student.weight_gradients(action.step, unit_of(action))
        elif action.op is Op.GATHER:
            with self.recorder.working(action):
                gradients = self.student.tied_gradients()
            self.mailbox.keep(action, gradients)
        elif action.op is Op.NORM:
            yield from self._add_up_tied(action)
            with self.recorder.working(action):
                squares = gradient_squares(self.student.counted)
            self.mailbox.keep(action, squares)
        elif action.op is Op.EMA:
            assert self.teacher is not None
            with self.recorder.working(action):
                self.teacher.follow(action.step)
        else:
            yield from self._update(action, batch)

    def _forward(self, action: Action, batch: Batch) -> Waiting:
        if action.role is Role.STUDENT:
            for need in self._taught_elsewhere(action):  # which it only comes after
                yield from self._taught(need, batch)
        value, gradients = yield from self._stage_input(action, batch)
        unchanged = guard_batch(value) if action.stage == 0 and self.structure.teacher_ranks else None
        with self.recorder.working(action):
            output = self._stage_output(action, value, gradients, batch)
        if unchanged is not None:
            unchanged(action.role.name.lower())
        if self.structure.train and action.microbatch == self.boundaries.last_unit(action.role, batch):
            stage = self.student if action.role is Role.STUDENT else self.teacher
            assert stage is not None
            stage.end_batch()
        self.mailbox.keep(action, output)

    def _stage_input(self, action: Action, batch: Batch) -> Generator[Message, None, tuple[Any, list[Tensor | None]]]:
        """The value that a forward starts from, and the list that a student's backward fills with its gradients."""
        unit, student = unit_of(action), action.role is Role.STUDENT
        if action.stage == 0:
            inputs = batch.inputs
            if self.boundaries.views and self.structure.train:
                inputs = inputs[self.boundaries.view(action)]
            value = rows_of(inputs, self.boundaries.slice_of(action, batch))
            return (copied(value) if student and 0 in self.boundaries.contracts.copies else value), []
        before = Action(action.role, action.stage - 1, Op.FORWARD, unit, action.step)
        if not student:
            taught = yield from self._taught(before, batch)
            return taught.output, []
        tensors = yield from self.mailbox.receive_packed(before, self.boundaries.forms(before, batch, self.rank))
        rows = self.boundaries.num_rows(action, batch)
        if self.structure.train:
            return self.student.enter(tensors, rows, unit, batch.length)
        return self.boundaries.contract(before, batch).join(tensors, rows), []

    def _taught(self, work: Action, batch: Batch) -> Generator[Message, None, Taught]:
        """What a teacher's forward gives this rank; waits for it where another rank does the forward."""
        if self.structure.rank_of(work) != self.rank and not self.mailbox.has(work):
            tensors = yield from self.mailbox.receive_packed(work, self.boundaries.forms(work, batch, self.rank))
            self.mailbox.keep(work, self.boundaries.join_taught(work, batch, self.rank, tensors))
        taught: Taught = self.mailbox.use(work)
        return taught

    def _stage_output(self, action: Action, value: Any, gradients: list[Tensor | None], batch: Batch) -> Any:
        """Run a stage forward."""
        step, unit = action.step, unit_of(action)
        if action.role is Role.TEACHER:
            assert self.teacher is not None
            return self.teacher.forward(value, step, unit)
        if not self.structure.train:
            return self.student.infer(value, step, unit)
        return self.student.forward(value, gradients, step, unit, self.boundaries.num_rows(action, batch), batch.length)

    def _loss(self, action: Action, batch: Batch) -> Waiting:
        number, structure = unit_of(action), self.structure
        outputs: dict[int, Any] = {}
        taught: dict[int, Any] = {}  # outputs of the whole teacher
        taken: dict[int, dict[int, Tensor]] = {}
        for need in needs(action, structure):
            if need.op is not Op.FORWARD or need.microbatch is None or not self.boundaries.num_rows(need, batch):
                continue
            if need.role is Role.STUDENT:
                outputs[need.microbatch] = self.mailbox.use(need)
                continue
            given = yield from self._taught(need, batch)
            taken.setdefault(need.microbatch, {}).update(given.taken)
            if need.stage == len(structure.teacher_ranks) - 1:
                taught[need.microbatch] = given.output
        batch = yield from self.batches.get_whole(action.step)
        target = batch.targets
        if not self.structure.batch_loss:
            target = rows_of(target, self.boundaries.slice_of(action, batch))
        rows = self.boundaries.num_rows(action, batch)
        with self.recorder.working(action):
            if self.metric is not None:
                self.metric(outputs[number], target, rows)
                return
            if action.stage == structure.last:
                factors = batch.factors(self.boundaries.contracts.loss_parts, rows)
                self.student.loss(number, outputs, taught, target, action.step, factors)
            if structure.features:
                factors_of = partial(batch.factors, rows=rows)
                self.student.feature_losses(number, list(outputs), list(taken.values()), target, action.step, factors_of)

    def _backward(self, action: Action, batch: Batch) -> Waiting:
        gradients = None  # the last stage's come from the loss
        if action.stage < self.structure.last:
            after = Action(Role.STUDENT, action.stage + 1, action.op, unit_of(action), action.step)
            gradients = yield from self.mailbox.receive_packed(after, self.boundaries.forms(after, batch, self.rank))
        with self.recorder.working(action):
            input_gradients = self.student.backward(gradients, action.step, unit_of(action))
        self.mailbox.keep(action, input_gradients)

    def _add_up_tied(self, work: Action) -> Waiting:
        """Add up the gradients of weights that several blocks have, with those of other stages where these have them too."""
        stages = self.boundaries.student_stages
        gradients: dict[range, Sequence[Tensor]] = {stages[work.stage]: self.student.tied_gradients()}
        for stage in self.structure.ties if work.stage in self.structure.ties else ():
            if stage != work.stage:
                gather = Action(Role.STUDENT, stage, Op.GATHER, None, work.step)
                gradients[stages[stage]] = yield from self.mailbox.receive(gather)
        self.student.add_up_tied(gradients)

    def _update(self, action: Action, batch: Batch) -> Waiting:
        if not self.structure.clip:
            yield from self._add_up_tied(action)
        if self.before_update is not None:
            self.before_update(action.step, batch)
        if self.structure.clip:
            squares = []
            for stage, source in enumerate(self.structure.student_ranks):
                norm = Action(Role.STUDENT, stage, Op.NORM, None, action.step)
                if source == self.rank:
                    squares.append(self.mailbox.use(norm))
                else:
                    squares += yield from self.mailbox.receive(norm)
            assert self.largest_norm is not None
            self.student.clip(torch.cat([s.cpu() for s in squares]), self.largest_norm)
        with self.recorder.working(action):
            self.student.update(action.step)
        if self.teacher is not None:
            self.teacher.note()
        if self.after_update is not None:
            yield from self.after_update(action.step, batch)

    # -- results that travel ----------------------------------------------------------------------------------------

    def _send(self, transfer: Action, batch: Batch) -> None:
        value = self.mailbox.use(transfer.payload)
        if transfer.op is Op.NORM:
            self.mailbox.send(transfer, [value.to(self.recorder.device)])
            return
        if transfer.op is Op.GATHER:
            self.mailbox.send(transfer, value)
            return
        destination = transfer.peer
        assert destination is not None
        if transfer.role is Role.TEACHER:
            value = self.boundaries.split_taught(transfer, batch, destination, value)
        elif transfer.op is Op.FORWARD:
            value = self.boundaries.contract(transfer, batch).split(value, self.boundaries.num_rows(transfer, batch))
        self.mailbox.send_packed(transfer, value, self.boundaries.forms(transfer, batch, destination))

    def _post(self, transfer: Action, batch: Batch) -> None:
        if transfer.op is Op.NORM:
            count = self.boundaries.num_trained[transfer.stage]
            self.mailbox.post(transfer, [torch.empty(count, dtype=torch.float64, device=self.recorder.device)])
        elif transfer.op is Op.GATHER:
            tied = self.boundaries.tied[transfer.stage]
            self.mailbox.post(transfer, [torch.empty(shape, dtype=dtype, device=self.recorder.device) for shape, dtype in tied])
        else:
            self.mailbox.post_packed(transfer, self.boundaries.forms(transfer, batch, self.rank))


class _BatchTravel:
    """How batches travel: inputs stay on the rank that reads them, targets go to the ranks with losses, counts to all."""

    def __init__(self, contracts: PipelineContracts, counted: Sequence[str]) -> None:
        self.contracts = contracts
        self.counted = counted
        self.header_length = HEADER_LENGTH + len(counted)

    def from_header(self, header: Tensor) -> Batch:
        return Batch.from_header(header, self.counted)

    def to_device(self, data: Batch, device: torch.device) -> Batch:
        return replace(data, inputs=to_device(data.inputs, device), targets=to_device(data.targets, device))

    def forms(self, data: Batch) -> Forms:
        return [] if data.ended else [(form, data.rows) for form in self.contracts.at(data.length).targets.values]

    def split(self, data: Batch) -> Sequence[Tensor]:
        return self.contracts.at(data.length).targets.split(data.targets, data.rows)

    def join(self, data: Batch, tensors: Sequence[Tensor]) -> Batch:
        return replace(data, targets=self.contracts.at(data.length).targets.join(tensors, data.rows))


def _with_update_first(row: list[Action], step: int) -> list[Action]:
    """The last period of an epoch, at whose update all ranks meet: work of later steps, and the teacher's move, come after it.

    A rank may do such work before its own update, and wait for a rank that does it after its own. Nothing of a step
    needs anything of a later one, so putting that off keeps every order that matters.
    """
    end = 1 + next(i for i, action in enumerate(row) if action.op is Op.UPDATE and action.step == step)

    def waits(action: Action) -> bool:
        later = action.step > step or action.op is Op.EMA
        return later and action.op is not Op.DATA and action.kind is not Kind.RECEIVE

    return [*(a for a in row[:end] if not waits(a)), *(a for a in row[:end] if waits(a)), *row[end:]]
