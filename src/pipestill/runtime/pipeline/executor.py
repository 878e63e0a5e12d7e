"""Runs one rank's row of a schedule.

The row is walked as a generator that yields whenever it has to wait, so the same code runs alone in its process
(where the transport itself waits) and interleaved with the other ranks in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipestill.model.contracts import Contract
from pipestill.model.nests import copied, rows_of, to_device
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.tensor_form import TensorForm
from pipestill.runtime.batch import HEADER_LENGTH, Batch, microbatch_rows
from pipestill.runtime.pipeline.stage import gradient_squares, guard_batch
from pipestill.runtime.record import Recorder
from pipestill.runtime.transport.protocol import Message, Transport, Waiting, receive
from pipestill.schedule import Action, Kind, Lane, Op, Role, Schedule
from pipestill.schedule.needs import lane, needs
from pipestill.schedule.pipeline.structure import PipelineStructure

_END = Batch(0, 0, True)


class Student(Protocol):
    """What the executor has a stage of the student do (see `StudentStage`)."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]: ...
    def enter(
        self, tensors: Sequence[Tensor], rows: int, unit: int, length: int
    ) -> tuple[Any, list[Tensor | None]]: ...
    def forward(
        self, value: Any, gradients: list[Tensor | None], step: int, unit: int, rows: int, length: int
    ) -> Any: ...
    def infer(self, value: Any, step: int, unit: int) -> Any: ...
    def end_batch(self) -> None: ...
    def loss(
        self, number: int, outputs: Mapping[int, Any], teacher: Mapping[int, Any], target: Any, step: int, share: float
    ) -> None: ...
    def backward(self, gradients: Sequence[Tensor] | None, step: int, unit: int) -> list[Tensor]: ...
    def weight_gradients(self, step: int, unit: int) -> None: ...
    def clip(self, squares: Tensor, largest: float) -> None: ...
    def update(self, step: int) -> None: ...


class Teacher(Protocol):
    """What the executor has a stage of the teacher do (see `TeacherStage`)."""

    def forward(self, value: Any, step: int, unit: int) -> Any: ...
    def end_batch(self) -> None: ...
    def note(self) -> None: ...
    def follow(self, step: int) -> None: ...


def _up_to_cut(row: list[Action], step: int) -> list[Action]:
    """A period at whose update all ranks meet: what belongs to later steps, and the teacher's move, comes after that.

    A rank may do such work before its own update, and wait for a rank that does it after its own. Nothing of a step
    needs anything of a later one, so putting that off keeps every order that matters.
    """
    end = 1 + next(i for i, action in enumerate(row) if action.op is Op.UPDATE and action.step == step)

    def waits(action: Action) -> bool:
        later = action.step > step or action.op is Op.EMA
        return later and action.op is not Op.DATA and action.kind is not Kind.RECEIVE

    return [*(a for a in row[:end] if not waits(a)), *(a for a in row[:end] if waits(a)), *row[end:]]


class PipelineExecutor:
    """One rank of one pass over the data.

    `source` gives the batches on the rank that reads them, and is None elsewhere. `after_update(step, batch)` runs
    where a step is over for this rank, after its own update: the cut for logs, learning rates and validation. `metric` is
    called on the last stage in a forward-only schedule with (output, target, rows).
    """

    def __init__(
        self,
        schedule: Schedule[PipelineStructure],
        rank: int,
        *,
        contracts: PipelineContracts,
        student_stages: Sequence[range],
        teacher_stages: Sequence[range],
        student: Student | None,
        teacher: Teacher | None,
        transport: Transport,
        recorder: Recorder,
        source: Iterator[Batch] | None,
        after_update: Callable[[int, Batch], Waiting] | None = None,
        before_update: Callable[[int, Batch], None] | None = None,
        clip: float | None = None,
        metric: Callable[[Any, Any, int], None] | None = None,
        segment: int = 0,
        views: bool = False,
        num_trained: Sequence[int] = (),
    ) -> None:
        self.schedule, self.rank, self.structure = schedule, rank, schedule.structure
        self.contracts, self.transport, self.recorder = contracts, transport, recorder
        self.student_stages, self.teacher_stages = student_stages, teacher_stages
        self.student, self.teacher = student, teacher
        self.source, self.metric, self.segment = source, metric, segment
        self.before_update, self.after_update, self.clip = before_update, after_update, clip
        self.views, self.num_trained = views, num_trained
        self.device = recorder.device
        self.batches: dict[int, Batch] = {}
        self.results: dict[Action, tuple[Any, int]] = {}
        self.uses = self._count_uses()
        self.holds_loss = self.structure.student_ranks[self.structure.last] == rank

    def run(self) -> Waiting:
        """Everything from the first batch to the last."""
        for period in count(-self.schedule.lookahead):
            if period >= 0:
                batch = yield from self._batch(period)
                if batch.rows == 0:
                    break
            row = [a.at(period + a.step) for a in self.schedule.rows[self.rank] if period + a.step >= 0]
            if period >= 0 and batch.last and self.structure.train:
                row = _up_to_cut(row, period)
            for action in row:
                yield from self._do(action)
            self.batches.pop(period, None)
        self.transport.flush(self.segment)

    def _count_uses(self) -> dict[Action, int]:
        """How often this rank uses the result of each work of a step: sends, and the loss of what is held locally."""
        uses: dict[Action, int] = {}
        for action in self.schedule.rows[self.rank]:
            results = []
            if action.kind is Kind.SEND and self._lane(action) is not Lane.TOKEN:
                results = [action.payload]
            elif action.op is Op.LOSS and action.computes:
                outputs = [need for need in needs(action, self.structure) if need.op is Op.FORWARD]
                results = [need for need in outputs if self.structure.rank_of(need) == self.rank]
            for result in results:
                uses[result.at(0)] = uses.get(result.at(0), 0) + 1
        return uses

    # -- one action ---------------------------------------------------------------------------------------------

    def _do(self, action: Action) -> Waiting:
        if action.op is Op.DATA:
            self._do_data(action)
            return
        batch = yield from self._batch(action.step)
        rows = self._rows(action, batch) if action.microbatch is not None and batch.rows else 0
        if (rows == 0 and action.op.per_microbatch) or batch.rows == 0:
            return
        if action.kind is Kind.SEND:
            self._send(action)
            return
        if action.kind is Kind.RECEIVE:
            self._post(action, rows)
            return
        yield from self._tokens(action)
        if action.op is Op.FORWARD:
            yield from self._forward(action, batch, rows)
        elif action.op is Op.LOSS:
            yield from self._loss(action, batch, rows)
        elif action.op in (Op.BACKWARD, Op.INPUT):
            yield from self._backward(action)
        elif action.op is Op.WEIGHT:
            assert self.student is not None and action.microbatch is not None
            with self.recorder.working(action):
                self.student.weight_gradients(action.step, action.microbatch)
        elif action.op is Op.NORM:
            self._norm(action)
        elif action.op is Op.EMA:
            assert self.teacher is not None
            with self.recorder.working(action):
                self.teacher.follow(action.step)
        else:
            yield from self._update(action, batch)

    def _tokens(self, action: Action) -> Waiting:
        """Wait for work of other ranks that only the order is about."""
        if self.structure.serial:
            for need in needs(action, self.structure):
                source = self.structure.rank_of(need)
                if source != self.rank and need.op is not Op.DATA and self._is_token(need):
                    yield from self._arrive(need, Lane.TOKEN)

    def _is_token(self, need: Action) -> bool:
        return lane(need.receive_from(self.structure.rank_of(need)), self.rank, self.structure) is Lane.TOKEN

    def _do_data(self, action: Action) -> None:
        if action.kind is Kind.SEND:
            self._send_data(action)
        elif action.kind is Kind.RECEIVE:
            header = torch.empty(HEADER_LENGTH, dtype=torch.int64)
            self.transport.post(self._message(action), [header])
        else:
            assert self.source is not None, "the rank of the data action has a source"
            batch = next(self.source, _END)
            inputs, targets = to_device(batch.inputs, self.device), to_device(batch.targets, self.device)
            self.batches[action.step] = replace(batch, inputs=inputs, targets=targets)

    def _forward(self, action: Action, batch: Batch, rows: int) -> Waiting:
        unit = action.microbatch
        assert unit is not None
        student = action.role is Role.STUDENT
        gradients: list[Tensor | None] = []
        unchanged = None
        if action.stage == 0:
            value = rows_of(self._view(action, batch), self._part(action, batch))
            if student and 0 in self.contracts.copies:
                value = copied(value)
            unchanged = guard_batch(value) if self.structure.teacher_ranks else None
        else:
            before = Action(action.role, action.stage - 1, Op.FORWARD, unit, action.step)
            tensors = yield from self._arrive(before, Lane.ACTIVATION if student else Lane.TEACHER)
            if student and self.structure.train:
                assert self.student is not None
                value, gradients = self.student.enter(tensors, rows, unit, batch.length)
            else:
                value = self._contract(before).join(tensors, rows)
        with self.recorder.working(action):
            if not student:
                assert self.teacher is not None
                output = self.teacher.forward(value, action.step, unit)
            elif self.structure.train:
                assert self.student is not None
                output = self.student.forward(value, gradients, action.step, unit, rows, batch.length)
            else:
                assert self.student is not None
                output = self.student.infer(value, action.step, unit)
        if unchanged is not None:
            unchanged("student" if student else "teacher")
        stage = self.student if student else self.teacher
        if stage is not None and self.structure.train and unit == self._last_unit(action, batch):
            stage.end_batch()
        self._keep(action, output)

    def _loss(self, action: Action, batch: Batch, rows: int) -> Waiting:
        number = action.microbatch
        assert self.student is not None and number is not None
        outputs: dict[Role, dict[int, Any]] = {Role.STUDENT: {}, Role.TEACHER: {}}
        for need in needs(action, self.structure):
            if need.op is not Op.FORWARD or need.microbatch is None or not self._rows(need, batch):
                continue
            if self.structure.rank_of(need) == self.rank:
                value = self._use(need)
            else:
                tensors = yield from self._arrive(need, Lane.TEACHER)
                value = self._contract(need).join(tensors, self._rows(need, batch))
            outputs[need.role][need.microbatch] = value
        targets = yield from self._targets(action.step)
        target = targets if self.structure.batch_loss else rows_of(targets, self._part(action, batch))
        with self.recorder.working(action):
            if self.metric is not None:
                self.metric(outputs[Role.STUDENT][number], target, rows)
            else:
                self.student.loss(
                    number, outputs[Role.STUDENT], outputs[Role.TEACHER], target, action.step, rows / batch.rows
                )

    def _backward(self, action: Action) -> Waiting:
        assert self.student is not None and action.microbatch is not None
        gradients = None
        if action.stage < self.structure.last:
            after = Action(Role.STUDENT, action.stage + 1, action.op, action.microbatch, action.step)
            gradients = yield from self._arrive(after, Lane.GRADIENT)
        with self.recorder.working(action):
            sent = self.student.backward(gradients, action.step, action.microbatch)
        self._keep(action, sent)

    def _update(self, action: Action, batch: Batch) -> Waiting:
        assert self.student is not None
        if self.before_update is not None:
            self.before_update(action.step, batch)
        if self.structure.clip:
            squares = []
            for stage, source in enumerate(self.structure.student_ranks):
                norm = Action(Role.STUDENT, stage, Op.NORM, None, action.step)
                if source == self.rank:
                    squares.append(self._use(norm))
                else:
                    squares += yield from self._arrive(norm, Lane.NORM)
            assert self.clip is not None
            self.student.clip(torch.cat([s.cpu() for s in squares]), self.clip)
        with self.recorder.working(action):
            self.student.update(action.step)
        if self.teacher is not None:
            self.teacher.note()
        if self.after_update is not None:
            yield from self.after_update(action.step, batch)

    def _norm(self, action: Action) -> None:
        assert self.student is not None
        with self.recorder.working(action):
            squares = gradient_squares(self.student.parameters.values())
        self.results[action] = (squares, 1 + self.uses.get(action.at(0), 0))  # the update of this rank uses it too

    # -- results and messages -----------------------------------------------------------------------------------

    def _keep(self, action: Action, output: Any) -> None:
        uses = self.uses.get(action.at(0), 0)
        if uses:
            self.results[action] = (output, uses)

    def _use(self, action: Action) -> Any:
        value, uses = self.results.pop(action)
        if uses > 1:
            self.results[action] = (value, uses - 1)
        return value

    def _message(self, transfer: Action, on: Lane | None = None) -> Message:
        assert transfer.peer is not None
        sends = transfer.kind is Kind.SEND
        source, destination = (self.rank, transfer.peer) if sends else (transfer.peer, self.rank)
        return Message(on or self._lane(transfer), transfer.payload, source, destination, self.segment)

    def _lane(self, transfer: Action) -> Lane:
        assert transfer.peer is not None
        destination = transfer.peer if transfer.kind is Kind.SEND else self.rank
        return lane(transfer, destination, self.structure)

    def _send(self, transfer: Action) -> None:
        message = self._message(transfer)
        if message.lane is Lane.TOKEN:
            self.transport.send(message, [torch.zeros(1, device=self.device)])
            return
        value = self._use(transfer.payload)
        if message.lane is Lane.NORM:
            self.transport.send(message, [value.to(self.device)])
            return
        rows = self._rows(transfer)
        tensors = value if message.lane is Lane.GRADIENT else self._contract(transfer).split(value, rows)
        if tensors:
            forms = self._forms(transfer)
            self.transport.send(message, [form.pack(t, rows) for t, form in zip(tensors, forms, strict=True)])

    def _post(self, transfer: Action, rows: int) -> None:
        message = self._message(transfer)
        if message.lane is Lane.TOKEN:
            self.transport.post(message, [torch.empty(1, device=self.device)])
        elif message.lane is Lane.NORM:
            count = self.num_trained[transfer.stage]
            self.transport.post(message, [torch.empty(count, dtype=torch.float64, device=self.device)])
        elif self._forms(transfer):
            self.transport.post(message, [form.empty(rows, self.device) for form in self._forms(transfer)])

    def _arrive(self, payload: Action, on: Lane) -> Generator[Message, None, list[Tensor]]:
        """Wait for what another rank computed; nothing to wait for where nothing travels."""
        plain = on in (Lane.TOKEN, Lane.NORM)
        forms = [] if plain else self._forms(payload)
        if not forms and not plain:
            return []
        message = self._message(payload.receive_from(self.structure.rank_of(payload)), on)
        tensors = yield from receive(self.transport, message)
        return tensors if plain else [f.unpack(t, self._rows(payload)) for t, f in zip(tensors, forms, strict=True)]

    def _views(self, action: Action) -> int:
        return self.structure.views if action.role is Role.STUDENT else self.structure.teacher_views

    def _last_unit(self, action: Action, batch: Batch) -> int:
        """The last unit of a step that has rows."""
        return min(self.structure.num_microbatches, batch.rows) * self._views(action) - 1

    def _part(self, action: Action, batch: Batch) -> slice:
        """Where the rows of an action's microbatch are in the batch; for a loss, of all that it takes."""
        unit, count = action.microbatch, self.structure.num_microbatches
        assert unit is not None
        if action.op is Op.LOSS:
            return slice(0, batch.rows) if self.structure.batch_loss else microbatch_rows(batch.rows, count)[unit]
        return microbatch_rows(batch.rows, count)[unit // self._views(action)]

    def _rows(self, action: Action, batch: Batch | None = None) -> int:
        """How many rows an action is about."""
        part = self._part(action, batch or self.batches[action.step])
        return int(part.stop - part.start)

    def _view(self, action: Action, batch: Batch) -> Any:
        assert action.microbatch is not None
        return batch.view(action.microbatch % self._views(action)) if self.views else batch.inputs

    def _contract(self, transfer: Action) -> Contract:
        """The contract of the boundary that a forward's or a backward's result crosses."""
        assert transfer.microbatch is not None
        student = transfer.role is Role.STUDENT
        stage = transfer.stage if transfer.op is Op.FORWARD else transfer.stage - 1
        at_length = self._contracts(transfer.step)
        contracts = at_length.student if student else at_length.teacher
        return contracts[transfer.microbatch % self._views(transfer)][self._last_block(transfer.role, stage)]

    def _contracts(self, step: int) -> PipelineContracts:
        return self.contracts.at(self.batches[step].length)

    def _forms(self, transfer: Action) -> list[TensorForm]:
        """The forms of the tensors that travel as the result of a forward or a backward."""
        contract = self._contract(transfer)
        return contract.values if transfer.op is Op.FORWARD else contract.gradients

    def _last_block(self, role: Role, stage: int) -> int:
        return (self.student_stages if role is Role.STUDENT else self.teacher_stages)[stage][-1]

    # -- the batch ----------------------------------------------------------------------------------------------

    def _batch(self, step: int) -> Generator[Message, None, Batch]:
        """What this rank knows of a step's batch; waits until the reading rank has told its rows."""
        if step not in self.batches:
            reader = self.structure.student_ranks[0]
            data = Action(Role.STUDENT, 0, Op.DATA, None, step)
            message = self._message(data.receive_from(reader))
            (header,) = yield from receive(self.transport, message)
            batch = self.batches[step] = Batch.from_header(header)
            if self.holds_loss and batch.rows and self.contracts.targets.tensor_leaves:
                forms = self._contracts(step).targets.values
                buffers = [form.empty(batch.rows, self.device) for form in forms]
                self.transport.post(self._message(data.receive_from(reader), Lane.TARGET), buffers)
        return self.batches[step]

    def _send_data(self, transfer: Action) -> None:
        batch = self.batches[transfer.step]
        self.transport.send(self._message(transfer), [batch.header()])
        contract = self._contracts(transfer.step).targets
        loss_rank = self.structure.student_ranks[self.structure.last]
        if transfer.peer == loss_rank and batch.rows and contract.tensor_leaves:
            tensors = contract.split(batch.targets, batch.rows)
            packed = [form.pack(t, batch.rows) for t, form in zip(tensors, contract.values, strict=True)]
            self.transport.send(self._message(transfer, Lane.TARGET), packed)

    def _targets(self, step: int) -> Generator[Message, None, Any]:
        """The targets of a step's whole batch, on the rank of the loss."""
        batch = self.batches[step]
        reader = self.structure.student_ranks[0]
        contract = self._contracts(step).targets
        if reader == self.rank or not contract.tensor_leaves:
            return batch.targets if reader == self.rank else contract.join([], batch.rows)
        if batch.targets is None:
            data = Action(Role.STUDENT, 0, Op.DATA, None, step)
            message = self._message(data.receive_from(reader), Lane.TARGET)
            packed = yield from receive(self.transport, message)
            tensors = [form.unpack(t, batch.rows) for t, form in zip(packed, contract.values, strict=True)]
            batch = self.batches[step] = replace(batch, targets=contract.join(tensors, batch.rows))
        return batch.targets
