"""Runs one rank's row of a schedule of blocks that learn alone."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pipestill.model.blockwise.contracts import BlockwiseContracts
from pipestill.model.contracts import Contract
from pipestill.model.nests import distinct_tensors, rows_of, to_device
from pipestill.runtime.blockwise.windows import Window, header_length
from pipestill.runtime.record import Recorder
from pipestill.runtime.transport.protocol import Message, Transport, Waiting, receive
from pipestill.schedule import Action, Kind, Lane, Op, Role, Schedule
from pipestill.schedule.blockwise.shares import Part, rows_of_part
from pipestill.schedule.blockwise.structure import BlockwiseStructure
from pipestill.schedule.needs import lane, needs


class Worker(Protocol):
    """What the executor has a rank do (see `BlockwiseWorker`)."""

    def teacher_output(self, block: int, value: Any) -> Any: ...
    def train(self, block: int, value: Any, target: Any, weight: float, batch: int, unit: int, group: Any) -> None: ...
    def reduce(self, block: int) -> None: ...
    def gradients(self, block: int) -> list[Tensor]: ...
    def set_gradients(self, block: int, summed: Sequence[Tensor]) -> None: ...
    def update(self, block: int, batch: int) -> None: ...
    def state_forms(self, block: int) -> list[tuple[tuple[int, ...], torch.dtype]]: ...
    def state(self, block: int) -> list[Tensor]: ...
    def set_state(self, block: int, tensors: Sequence[Tensor]) -> None: ...


class BlockwiseExecutor:
    """One rank of one phase. The schedule counts the phase's `ranks` from 0; messages name them as the world does.

    `source` gives windows on the rank that reads them, and is None elsewhere. `groups` are the process groups of ranks
    that share blocks; without them, ranks take turns in one process. `after_step(step, window)` runs when all that this
    rank does for a window is done.
    """

    def __init__(
        self,
        schedule: Schedule[BlockwiseStructure],
        rank: int,
        *,
        ranks: Sequence[int],
        worker: Worker,
        contracts: BlockwiseContracts,
        transport: Transport,
        recorder: Recorder,
        source: Iterator[Window] | None,
        groups: dict[tuple[int, ...], dist.ProcessGroup] | None,
        after_step: Callable[[int, Window], Waiting] | None = None,
        segment: int = 0,
    ) -> None:
        self.schedule, self.rank, self.ranks, self.structure = schedule, rank, ranks, schedule.structure
        self.worker, self.contracts, self.transport, self.recorder = worker, contracts, transport, recorder
        self.source, self.groups, self.after_step, self.segment = source, groups, after_step, segment
        self.device = recorder.device
        self.windows: dict[int, Window] = {}
        self.results: dict[
            Action, tuple[Any, int]
        ] = {}  # a teacher forward -> its output here, and how often it is used yet
        self.sources: dict[tuple[Action, int], list[tuple[Action, Part]]] = {}  # of each work of a step, see `_sources`
        self.uses = self._count_uses()
        self.packed: tuple[int, list[Tensor]] = (-1, [])  # the samples of a step as they go to one rank after the other
        self.heard = set[Message]()  # transfers whose arrival only the order was about
        self.row = schedule.rows[rank]
        self.tokens = {a.at(0): self._tokens_of(a.at(0)) for a in self.row if a.op in (Op.FORWARD, Op.BACKWARD)}
        self.reads_samples = self.structure.reads_samples(rank)
        self.forms = {a.stage: worker.state_forms(a.stage) for a, _ in self.structure.moves if self._touches(a)}

    def _touches(self, update: Action) -> bool:
        """Whether this rank ever sends or receives the block of an update."""
        return self.rank in {share.rank for share in self.structure.student[update.stage]}

    def run(self) -> Waiting:
        """Everything from the first window to the last."""
        for period in count(-self.schedule.lookahead):
            if period >= 0:
                window = yield from self._window(period)
                if window.ended:
                    break
            for action in self.row:
                if period + action.step >= 0:
                    yield from self._do(action.at(period + action.step))
            if period >= 0:
                if self.after_step is not None:
                    yield from self.after_step(period, self.windows[period])
                del self.windows[period]
        self.transport.flush(self.segment)

    def _count_uses(self) -> dict[Action, int]:
        """How often this rank uses each teacher forward of a step: its own work, and sends of what it computed."""
        uses: dict[Action, int] = {}
        for action in self.schedule.rows[self.rank]:
            used = []
            if action.kind is Kind.SEND and self._lane(action, action.peer) is Lane.TEACHER:
                used = [action.payload]
            elif action.computes and action.op in (Op.FORWARD, Op.BACKWARD):
                used = [source for block in self.structure.reads(action) for source, _ in self._sources(action, block)]
            for source in used:
                uses[source.at(0)] = uses.get(source.at(0), 0) + 1
        return uses

    def _sources(self, action: Action, block: int) -> list[tuple[Action, Part]]:
        """The teacher forwards whose rows `action` takes of a block, with the rows that each has."""
        key = action.at(0), block
        if key not in self.sources:
            units = self.structure.sources(block, self.structure.share_of(action)) if block >= 0 else []
            parts = [self.structure.teacher[block][u].part for u in units]
            forwards = [Action(Role.TEACHER, block, Op.FORWARD, u, 0) for u in units]
            self.sources[key] = list(zip(forwards, parts, strict=True))
        return [(forward.at(action.step), part) for forward, part in self.sources[key]]

    # -- one action ---------------------------------------------------------------------------------------------

    def _do(self, action: Action) -> Waiting:
        if action.op is Op.DATA:
            self._do_data(action)
            return
        window = yield from self._window(action.step)
        if window.ended:
            return
        batch = self.structure.share_of(action).batch
        there = window.rows[batch] > 0  # at the end of an epoch the last batches of a window may be missing
        if action.kind is Kind.SEND:
            self._send(action, there)
        elif action.kind is Kind.RECEIVE:
            self._post(action, there)
        elif action.op is Op.FORWARD:
            yield from self._tokens(action)
            if there:
                yield from self._teach(action)
        elif action.op is Op.BACKWARD:
            yield from self._tokens(action)
            yield from self._take_over(action)
            if there:
                yield from self._learn(action, window)
        elif there and action.op is Op.REDUCE:
            yield from self._reduce(action)
        elif there:
            with self.recorder.working(action):
                self.worker.update(action.stage, window.first + batch)

    def _teach(self, action: Action) -> Waiting:
        value = yield from self._rows(action, action.stage - 1)
        output = None
        if value is not None:
            with self.recorder.working(action):
                output = self.worker.teacher_output(action.stage, value)
        if self.uses.get(action.at(0)):
            self.results[action] = output, self.uses[action.at(0)]

    def _learn(self, action: Action, window: Window) -> Waiting:
        value = yield from self._rows(action, action.stage - 1)
        target = yield from self._rows(action, action.stage)
        share = self.structure.share_of(action)
        rows = self._count(share.part, action)
        unit = self.structure.of_batch(Role.STUDENT, action.stage, share.batch).index(action.microbatch or 0)
        sharers = tuple(self.ranks[self.structure.rank_of(a)] for a in self.structure.sharers(action))
        group = self.groups[sharers] if self.groups is not None and len(sharers) > 1 else None
        with self.recorder.working(action):
            total = window.rows[share.batch]
            self.worker.train(action.stage, value, target, rows / total, window.first + share.batch, unit, group)
        if self.groups is None and len(sharers) > 1:
            for other in set(sharers) - {self.ranks[self.rank]}:
                sent = Message(Lane.REDUCE, action, self.ranks[self.rank], other, self.segment)
                self.transport.send(sent, self.worker.gradients(action.stage))

    def _reduce(self, action: Action) -> Waiting:
        if self.groups is not None:
            with self.recorder.working(action):
                self.worker.reduce(action.stage)
            self._settle_samples(action)
            return
        parts: list[list[Tensor]] = []
        for other in self.structure.sharers(
            Action(Role.STUDENT, action.stage, Op.BACKWARD, action.microbatch, action.step)
        ):
            source = self.structure.rank_of(other)
            if source == self.rank:
                parts.append(self.worker.gradients(action.stage))
            else:
                message = Message(Lane.REDUCE, other, self.ranks[source], self.ranks[self.rank], self.segment)
                parts.append((yield from receive(self.transport, message)))
        with self.recorder.working(action):
            summed = [torch.stack(tensors).sum(0) for tensors in zip(*parts, strict=True)]
            self.worker.set_gradients(action.stage, summed)

    def _settle_samples(self, reduced: Action) -> None:
        """Who has added up gradients of a window has the samples of the one before."""
        if self.source is not None:
            read = Action(Role.STUDENT, 0, Op.DATA, None, reduced.step - 1)
            for other in {self.structure.rank_of(a) for a in self.structure.sharers(reduced)} - {self.rank}:
                self.transport.settle(self._message(read.send_to(other), Lane.INPUT))

    def _take_over(self, action: Action) -> Waiting:
        """The block that `action` trains, from the rank that trained it before."""
        before = self.structure.before(action)
        if before is not None and before.step >= 0 and (before.at(0), self.rank) in self.structure.moves:
            tensors = yield from receive(self.transport, self._from(before, Lane.STATE))
            self.worker.set_state(action.stage, tensors)

    def _tokens_of(self, action: Action) -> list[Action]:
        """Work of other ranks that `action` (of step 0) waits for, and that only the order is about."""
        others = [need for need in needs(action, self.structure) if need.op is not Op.DATA]
        others = [need for need in others if self.structure.rank_of(need) != self.rank]
        return [need for need in others if self._lane(need, self.rank) is Lane.TOKEN]

    def _tokens(self, action: Action) -> Waiting:
        """Wait for work of other ranks that only the order is about."""
        for need in self.tokens[action.at(0)]:
            step = need.step + action.step
            message = self._from(need.at(step), Lane.TOKEN) if step >= 0 else None
            if message is not None and message not in self.heard:
                yield from receive(self.transport, message)
                recent = action.step - self.structure.ahead - 2
                self.heard = {m for m in self.heard if m.payload.step >= recent} | {message}
            if message is not None and need.at(0) in self.structure.receipts.get(action.at(0), ()):
                sent = action.at(step).send_to(self.structure.rank_of(need))
                self.transport.settle(self._message(sent, Lane.TEACHER))

    # -- rows of teacher blocks -----------------------------------------------------------------------------------

    def _count(self, part: Part, action: Action) -> int:
        """How many rows a part has of the batch of `action`."""
        rows = rows_of_part(part, self._batch_rows(action))
        return int(rows.stop - rows.start)

    def _batch_rows(self, action: Action) -> int:
        return self.windows[action.step].rows[self.structure.share_of(action).batch]

    def _rows(self, action: Action, block: int) -> Generator[Message, None, Any]:
        """The rows of `action` behind a teacher block (-1: of the samples), from wherever they are; None for no rows."""
        total = self._batch_rows(action)
        share = self.structure.share_of(action)
        wanted = rows_of_part(share.part, total)
        pieces = []
        if block < 0 and wanted.start < wanted.stop:
            samples = yield from self._samples(action.step)
            pieces.append(_cut(samples[share.batch], 0, total, wanted))
        for source, part in self._sources(action, block):
            value, held = yield from self._output(source, part, total)
            inside = slice(max(held.start, wanted.start), min(held.stop, wanted.stop))
            if inside.start < inside.stop:
                pieces.append(_cut(value, held.start, held.stop, inside))
        if wanted.start == wanted.stop:
            return None
        return pieces[0] if len(pieces) == 1 else _joined(self.contracts.outputs[block], pieces)

    def _output(self, source: Action, part: Part, total: int) -> Generator[Message, None, tuple[Any, slice]]:
        """What a teacher forward gave, as far as this rank has it or gets it, and which rows of the batch that is."""
        here = self.structure.rank_of(source) == self.rank
        held = rows_of_part(part if here else self.structure.relays[source.at(0), self.rank], total)
        if source not in self.results:
            assert not here, f"{source} was run before"
            value = None
            if held.start < held.stop:
                contract = self.contracts.outputs[source.stage]
                packed = yield from receive(self.transport, self._from(source, Lane.TEACHER))
                rows = held.stop - held.start
                value = contract.join([f.unpack(t, rows) for t, f in zip(packed, contract.values, strict=True)], rows)
            self.results[source] = value, self.uses[source.at(0)]
        return self._use(source), held

    def _use(self, source: Action) -> Any:
        value, uses = self.results.pop(source)
        if uses > 1:
            self.results[source] = value, uses - 1
        return value

    # -- messages -------------------------------------------------------------------------------------------------

    def _lane(self, transfer: Action, destination: int | None) -> Lane:
        assert destination is not None
        return lane(transfer, destination, self.structure)

    def _message(self, transfer: Action, on: Lane) -> Message:
        assert transfer.peer is not None
        mine, theirs = self.ranks[self.rank], self.ranks[transfer.peer]
        source, destination = (mine, theirs) if transfer.kind is Kind.SEND else (theirs, mine)
        return Message(on, transfer.payload, source, destination, self.segment)

    def _from(self, payload: Action, on: Lane) -> Message:
        """The message that brings another rank's result."""
        return self._message(payload.receive_from(self.structure.rank_of(payload)), on)

    def _send(self, transfer: Action, there: bool) -> None:
        on = self._lane(transfer, transfer.peer)
        message = self._message(transfer, on)
        if on is Lane.TOKEN:
            self.transport.send(message, [torch.zeros(1, device=self.device)])
        elif on is Lane.STATE:
            self.transport.send(message, [t.reshape(-1) for t in self.worker.state(transfer.stage)])
        elif there:
            assert transfer.peer is not None
            value = self._use(transfer.payload)
            total = self._batch_rows(transfer)
            held = rows_of_part(self.structure.share_of(transfer).part, total)
            wanted = rows_of_part(self.structure.relays[transfer.payload.at(0), transfer.peer], total)
            if wanted.start < wanted.stop:
                contract, rows = self.contracts.outputs[transfer.stage], wanted.stop - wanted.start
                tensors = contract.split(_cut(value, held.start, held.stop, wanted), rows)
                self.transport.send(message, [f.pack(t, rows) for t, f in zip(tensors, contract.values, strict=True)])

    def _post(self, transfer: Action, there: bool) -> None:
        on = self._lane(transfer, self.rank)
        message = self._message(transfer, on)
        if on is Lane.TOKEN:
            self.transport.post(message, [torch.empty(1, device=self.device)])
        elif on is Lane.STATE:
            forms = self.forms[transfer.stage]
            self.transport.post(
                message, [torch.empty(torch.Size(s).numel(), dtype=d, device=self.device) for s, d in forms]
            )
        elif there:
            wanted = rows_of_part(self.structure.relays[transfer.payload.at(0), self.rank], self._batch_rows(transfer))
            if wanted.start < wanted.stop:
                rows = wanted.stop - wanted.start
                forms_ = self.contracts.outputs[transfer.stage].values
                self.transport.post(message, [form.empty(rows, self.device) for form in forms_])

    # -- the window -----------------------------------------------------------------------------------------------

    def _do_data(self, action: Action) -> None:
        if action.computes:
            assert self.source is not None, "the rank of the data action has a source"
            window = next(self.source)
            inputs = None if window.inputs is None else tuple(to_device(v, self.device) for v in window.inputs)
            self.windows[action.step] = replace(window, inputs=inputs)
        elif action.kind is Kind.RECEIVE:
            header = torch.empty(header_length(self.structure.window), dtype=torch.int64)
            self.transport.post(self._message(action, Lane.DATA), [header])
        else:
            assert action.peer is not None
            window = self.windows[action.step]
            self.transport.send(self._message(action, Lane.DATA), [window.header()])
            if self.structure.reads_samples(action.peer) and not window.ended:
                if self.packed[0] != action.step:
                    self.packed = action.step, self._packed(window)
                self.transport.send(self._message(action, Lane.INPUT), self.packed[1])

    def _packed(self, window: Window) -> list[Tensor]:
        """The samples of a window as they travel."""
        contract, packed = self.contracts.inputs, list[Tensor]()
        for rows, inputs in zip(window.rows, window.inputs or (), strict=False):
            tensors = contract.split(inputs, rows)
            packed += [form.pack(t, rows) for t, form in zip(tensors, contract.values, strict=True)]
        return packed

    def _window(self, step: int) -> Generator[Message, None, Window]:
        """What this rank knows of a step's window; waits until the reading rank has told of it."""
        if step not in self.windows:
            data = Action(Role.STUDENT, 0, Op.DATA, None, step)
            (header,) = yield from receive(self.transport, self._from(data, Lane.DATA))
            window = self.windows[step] = Window.from_header(header)
            if self.reads_samples and not window.ended:
                forms = [(form, rows) for rows in window.rows if rows for form in self.contracts.inputs.values]
                self.transport.post(self._from(data, Lane.INPUT), [f.empty(rows, self.device) for f, rows in forms])
        return self.windows[step]

    def _samples(self, step: int) -> Generator[Message, None, tuple[Any, ...]]:
        """The batches of a window, whole."""
        window = self.windows[step]
        if window.inputs is None:
            data = Action(Role.STUDENT, 0, Op.DATA, None, step)
            packed = iter((yield from receive(self.transport, self._from(data, Lane.INPUT))))
            contract = self.contracts.inputs
            inputs = tuple(
                contract.join([form.unpack(next(packed), rows) for form in contract.values], rows)
                for rows in window.rows if rows
            )  # fmt: skip
            window = self.windows[step] = replace(window, inputs=inputs)
        assert window.inputs is not None
        return window.inputs


def _cut(value: Any, start: int, stop: int, wanted: slice) -> Any:
    """Rows `wanted` of a batch, out of a value that holds rows `start` to `stop` of it."""
    if (start, stop) == (wanted.start, wanted.stop):
        return value
    return rows_of(value, slice(wanted.start - start, wanted.stop - start))


def _joined(contract: Contract, pieces: Sequence[Any]) -> Any:
    """Values of consecutive rows as one."""
    counts = [distinct_tensors(piece)[0].shape[0] for piece in pieces]
    columns = zip(*(contract.split(piece, rows) for piece, rows in zip(pieces, counts, strict=True)), strict=True)
    return contract.join([torch.cat(tensors) for tensors in columns], sum(counts))
