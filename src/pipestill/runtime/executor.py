"""Runs one rank's row of a schedule.

The row is walked as a generator that yields whenever it has to wait, so the same code runs alone in its process
(where the transport itself waits) and interleaved with the other ranks in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from pipestill.model.boundary import Contract, Form, copied, rows_of, to_device
from pipestill.model.dry_run import Contracts
from pipestill.runtime.batch import HEADER_LENGTH, Batch, microbatch_rows
from pipestill.runtime.record import Recorder
from pipestill.runtime.stage import StudentStage, TeacherStage, guard_batch
from pipestill.runtime.transport import Message, Transport
from pipestill.schedule import Action, Kind, Lane, Op, Role, Schedule
from pipestill.schedule.needs import lane

Waiting = Generator[Message, None, None]
"""Yields the message it waits for; the driver resumes it to try again."""

_END = Batch(0, 0, True)


class Executor:
    """One rank of one pass over the data.

    `source` gives the batches on the rank that reads them, and is None elsewhere. `after_update(step, batch)` runs
    where a step is over for this rank, after its own update: the cut for logs, learning rates and validation. `metric` is
    called on the last stage in a forward-only schedule with (output, target, rows).
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        *,
        contracts: Contracts,
        student_stages: Sequence[range],
        teacher_stages: Sequence[range],
        student: StudentStage | None,
        teacher: TeacherStage | None,
        transport: Transport,
        recorder: Recorder,
        source: Iterator[Batch] | None,
        lr_factor: Callable[[int], float] = lambda step: 1.0,
        after_update: Callable[[int, Batch], Waiting] | None = None,
        before_update: Callable[[int, Batch], None] | None = None,
        metric: Callable[[Any, Any, int], None] | None = None,
        phase: int = 0,
    ) -> None:
        self.schedule, self.rank, self.structure = schedule, rank, schedule.structure
        self.contracts, self.transport, self.recorder = contracts, transport, recorder
        self.student_stages, self.teacher_stages = student_stages, teacher_stages
        self.student, self.teacher = student, teacher
        self.source, self.lr_factor, self.metric, self.phase = source, lr_factor, metric, phase
        self.before_update, self.after_update = before_update, after_update
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
            for action in self.schedule.rows[self.rank]:
                if period + action.step >= 0:
                    yield from self._do(action.at(period + action.step))
            self.batches.pop(period, None)
        self.transport.flush(self.phase)

    def _count_uses(self) -> dict[Action, int]:
        """How often this rank uses the result of each work of a step: sends, and the loss of what is held locally."""
        uses: dict[Action, int] = {}
        s = self.structure
        for action in self.schedule.rows[self.rank]:
            if action.kind is Kind.SEND:
                uses[action.payload.at(0)] = uses.get(action.payload.at(0), 0) + 1
            elif action.op is Op.LOSS and action.computes:
                outputs = [Action(Role.STUDENT, s.last, Op.FORWARD, action.microbatch, 0)]
                if s.teacher_ranks and s.teacher_ranks[-1] == self.rank:
                    outputs.append(Action(Role.TEACHER, len(s.teacher_ranks) - 1, Op.FORWARD, action.microbatch, 0))
                for output in outputs:
                    uses[output] = uses.get(output, 0) + 1
        return uses

    # -- one action ---------------------------------------------------------------------------------------------

    def _do(self, action: Action) -> Waiting:
        if action.op is Op.DATA:
            self._do_data(action)
            return
        batch = yield from self._batch(action.step)
        rows = 0
        if action.microbatch is not None and batch.rows:
            part = microbatch_rows(batch.rows, self.structure.num_microbatches)[action.microbatch]
            rows = part.stop - part.start
        if (rows == 0 and action.op is not Op.UPDATE) or batch.rows == 0:
            return
        if action.kind is Kind.SEND:
            self._send(action)
        elif action.kind is Kind.RECEIVE:
            self._post(action, rows)
        elif action.op is Op.FORWARD:
            yield from self._forward(action, batch, rows)
        elif action.op is Op.LOSS:
            yield from self._loss(action, batch, rows)
        elif action.op is Op.BACKWARD:
            yield from self._backward(action)
        else:
            yield from self._update(action, batch)

    def _do_data(self, action: Action) -> None:
        if action.kind is Kind.SEND:
            self._send_data(action)
        elif action.kind is Kind.RECEIVE:
            header = torch.empty(HEADER_LENGTH, dtype=torch.int64)
            self.transport.post(self._message(action), [header])
        else:
            assert self.source is not None, "the rank of the data action has a source"
            batch = next(self.source, _END)
            self.batches[action.step] = Batch(
                batch.rows, batch.epoch, batch.last,
                to_device(batch.inputs, self.device), to_device(batch.targets, self.device),
            )  # fmt: skip

    def _forward(self, action: Action, batch: Batch, rows: int) -> Waiting:
        assert action.microbatch is not None
        student = action.role is Role.STUDENT
        if self.structure.serial and student and action.stage == 0 and self.structure.teacher_ranks:
            ends = Action(
                Role.TEACHER, len(self.structure.teacher_ranks) - 1, Op.FORWARD, action.microbatch, action.step
            )
            if self.structure.rank_of(ends) != self.rank:
                yield from self._arrive(ends, Lane.TOKEN)
        gradients: list[Tensor | None] = []
        unchanged = None
        if action.stage == 0:
            part = microbatch_rows(batch.rows, self.structure.num_microbatches)[action.microbatch]
            value = rows_of(batch.inputs, part)
            if student and 0 in self.contracts.copies:
                value = copied(value)
            unchanged = guard_batch(value) if self.structure.teacher_ranks else None
        else:
            before = Action(action.role, action.stage - 1, Op.FORWARD, action.microbatch, action.step)
            tensors = yield from self._arrive(before, Lane.ACTIVATION if student else Lane.TEACHER)
            if student and self.structure.train:
                assert self.student is not None
                value, gradients = self.student.enter(tensors, rows)
            else:
                value = self._contract(before).join(tensors, rows)
        with self.recorder.working(action):
            if not student:
                assert self.teacher is not None
                output = self.teacher.forward(value, action.step, action.microbatch)
            elif self.structure.train:
                assert self.student is not None
                output = self.student.forward(value, gradients, action.step, action.microbatch, rows)
            else:
                assert self.student is not None
                output = self.student.infer(value, action.step, action.microbatch)
        if unchanged is not None:
            unchanged("student" if student else "teacher")
        self._keep(action, output)

    def _loss(self, action: Action, batch: Batch, rows: int) -> Waiting:
        assert self.student is not None and action.microbatch is not None
        output = self._use(Action(Role.STUDENT, action.stage, Op.FORWARD, action.microbatch, action.step))
        teacher = None
        if self.structure.teacher_ranks:
            ends = Action(
                Role.TEACHER, len(self.structure.teacher_ranks) - 1, Op.FORWARD, action.microbatch, action.step
            )
            if self.structure.rank_of(ends) == self.rank:
                teacher = self._use(ends)
            else:
                tensors = yield from self._arrive(ends, Lane.TEACHER)
                teacher = self._contract(ends).join(tensors, rows)
        targets = yield from self._targets(action.step)
        target = rows_of(targets, microbatch_rows(batch.rows, self.structure.num_microbatches)[action.microbatch])
        with self.recorder.working(action):
            if self.metric is not None:
                self.metric(output, target, rows)
            else:
                share = rows / batch.rows
                self.student.loss(output, teacher, target, action.step, action.microbatch, share)

    def _backward(self, action: Action) -> Waiting:
        assert self.student is not None and action.microbatch is not None
        gradients = None
        if action.stage < self.structure.last:
            after = Action(Role.STUDENT, action.stage + 1, Op.BACKWARD, action.microbatch, action.step)
            gradients = yield from self._arrive(after, Lane.GRADIENT)
        with self.recorder.working(action):
            sent = self.student.backward(gradients, action.step, action.microbatch)
        self._keep(action, sent)

    def _update(self, action: Action, batch: Batch) -> Waiting:
        assert self.student is not None
        if self.before_update is not None:
            self.before_update(action.step, batch)
        with self.recorder.working(action):
            self.student.update(self.lr_factor(action.step))
        if self.after_update is not None:
            yield from self.after_update(action.step, batch)

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
        return Message(
            on or lane(transfer, destination, self.structure), transfer.payload, source, destination, self.phase
        )

    def _send(self, transfer: Action) -> None:
        message = self._message(transfer)
        value = self._use(transfer.payload)
        if message.lane is Lane.TOKEN:
            self.transport.send(message, [torch.zeros(1, device=self.device)])
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
        elif self._forms(transfer):
            self.transport.post(message, [form.empty(rows, self.device) for form in self._forms(transfer)])

    def _arrive(self, payload: Action, on: Lane) -> Generator[Message, None, list[Tensor]]:
        """Wait for what another rank computed; nothing to wait for where nothing travels."""
        forms = [] if on is Lane.TOKEN else self._forms(payload)
        if not forms and on is not Lane.TOKEN:
            return []
        message = self._message(payload.receive_from(self.structure.rank_of(payload)), on)
        while not self.transport.arrived(message):
            yield message
        tensors = self.transport.take(message)
        rows = self._rows(payload)
        return [form.unpack(t, rows) for t, form in zip(tensors, forms, strict=True)] if forms else tensors

    def _rows(self, action: Action) -> int:
        """The rows of an action's microbatch."""
        assert action.microbatch is not None
        part = microbatch_rows(self.batches[action.step].rows, self.structure.num_microbatches)[action.microbatch]
        return int(part.stop - part.start)

    def _contract(self, transfer: Action) -> Contract:
        """The contract of the boundary that a forward's or a backward's result crosses."""
        student = transfer.role is Role.STUDENT
        stage = transfer.stage - 1 if transfer.op is Op.BACKWARD else transfer.stage
        return (self.contracts.student if student else self.contracts.teacher)[self._last_block(transfer.role, stage)]

    def _forms(self, transfer: Action) -> list[Form]:
        """The forms of the tensors that travel as the result of a forward or a backward."""
        contract = self._contract(transfer)
        return contract.gradients if transfer.op is Op.BACKWARD else contract.values

    def _last_block(self, role: Role, stage: int) -> int:
        return (self.student_stages if role is Role.STUDENT else self.teacher_stages)[stage][-1]

    # -- the batch ----------------------------------------------------------------------------------------------

    def _batch(self, step: int) -> Generator[Message, None, Batch]:
        """What this rank knows of a step's batch; waits until the reading rank has told its rows."""
        if step not in self.batches:
            reader = self.structure.student_ranks[0]
            data = Action(Role.STUDENT, 0, Op.DATA, None, step)
            message = self._message(data.receive_from(reader))
            while not self.transport.arrived(message):
                yield message
            (header,) = self.transport.take(message)
            batch = self.batches[step] = Batch.from_header(header)
            if self.holds_loss and batch.rows and self.contracts.targets.tensor_leaves:
                buffers = [form.empty(batch.rows, self.device) for form in self.contracts.targets.values]
                self.transport.post(self._message(data.receive_from(reader), Lane.TARGET), buffers)
        return self.batches[step]

    def _send_data(self, transfer: Action) -> None:
        batch = self.batches[transfer.step]
        self.transport.send(self._message(transfer), [batch.header()])
        contract = self.contracts.targets
        loss_rank = self.structure.student_ranks[self.structure.last]
        if transfer.peer == loss_rank and batch.rows and contract.tensor_leaves:
            tensors = contract.split(batch.targets, batch.rows)
            packed = [form.pack(t, batch.rows) for t, form in zip(tensors, contract.values, strict=True)]
            self.transport.send(self._message(transfer, Lane.TARGET), packed)

    def _targets(self, step: int) -> Generator[Message, None, Any]:
        """The targets of a step's whole batch, on the rank of the loss."""
        batch = self.batches[step]
        reader = self.structure.student_ranks[0]
        contract = self.contracts.targets
        if reader == self.rank or not contract.tensor_leaves:
            return batch.targets if reader == self.rank else contract.join([], batch.rows)
        if batch.targets is None:
            data = Action(Role.STUDENT, 0, Op.DATA, None, step)
            message = self._message(data.receive_from(reader), Lane.TARGET)
            while not self.transport.arrived(message):
                yield message
            packed = self.transport.take(message)
            tensors = [form.unpack(t, batch.rows) for t, form in zip(packed, contract.values, strict=True)]
            batch = self.batches[step] = replace(batch, targets=contract.join(tensors, batch.rows))
        return batch.targets
