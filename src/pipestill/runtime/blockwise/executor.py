"""Runs one rank's row of a schedule of blockwise training."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pipestill.model.blockwise.task import BlockwiseContracts
from pipestill.model.contracts import Contract
from pipestill.model.nests import distinct_tensors, rows_of, to_device
from pipestill.runtime.batch import Window, header_length
from pipestill.runtime.mailbox import Forms, Mailbox, StepData
from pipestill.runtime.record import Recorder
from pipestill.runtime.transport.message import Message
from pipestill.runtime.transport.protocol import Transport, Waiting
from pipestill.schedule import Action, Kind, Lane, Op, Role, Schedule
from pipestill.schedule.blockwise.shares import Part, rows_of_part
from pipestill.schedule.blockwise.structure import BlockwiseStructure


class Worker(Protocol):
    """What an executor asks of a rank's blocks (see `BlockwiseWorker`)."""

    def teacher_output(self, block: int, value: Any) -> Any: ...
    def train(self, block: int, value: Any, target: Any, weight: float, batch: int, unit: int, group: Any) -> None: ...
    def reduce(self, block: int) -> None: ...
    def gradients(self, block: int) -> list[Tensor]: ...
    def set_gradients(self, block: int, summed: Sequence[Tensor]) -> None: ...
    def update(self, block: int, batch: int) -> None: ...
    def state_forms(self, block: int) -> list[tuple[tuple[int, ...], torch.dtype]]: ...
    def state(self, block: int) -> list[Tensor]: ...
    def set_state(self, block: int, tensors: Sequence[Tensor]) -> None: ...


@dataclass(eq=False)
class BlockwiseExecutor:
    """Runs one rank's row over all windows of one phase. The schedule counts the phase's `ranks` from 0.

    `source` gives windows on the rank that reads them, and is None elsewhere. `groups` are the process groups of ranks
    that share batches of a block; without them, ranks take turns in one process. `after_step(step, window)` runs when all
    that this rank does for a window is done.
    """

    schedule: Schedule[BlockwiseStructure]
    rank: int
    ranks: Sequence[int]
    worker: Worker
    contracts: BlockwiseContracts
    transport: Transport
    recorder: Recorder
    source: Iterator[Window] | None
    groups: dict[tuple[int, ...], dist.ProcessGroup] | None
    after_step: Callable[[int, Window], Waiting] | None = None
    segment: int = 0

    def __post_init__(self) -> None:
        self.structure = self.schedule.structure
        self.sources: dict[tuple[Action, int], list[tuple[Action, Part]]] = {}
        """By work of step 0 and teacher block whose rows it takes: the results that have them (see `_sources_of`)."""
        self.mailbox = Mailbox(
            self.schedule, self.rank, self.transport, device=self.recorder.device, local_uses=self._local_uses,
            segment=self.segment, ranks=self.ranks,
        )  # fmt: skip
        self.windows = StepData(self.mailbox, self.source, _WindowTravel(self.contracts.inputs, self.structure.window))
        moving = {update.stage for update, _ in self.structure.moves}
        held = {block for block in moving for share in self.structure.student[block] if share.rank == self.rank}
        self.state_forms = {block: self.worker.state_forms(block) for block in sorted(held)}
        """By block that moves between ranks and is ever on this one: the forms of its state's tensors."""

    def run(self) -> Waiting:
        """Run every period of the schedule, from the first window to the last."""
        for period in count(-self.schedule.lookahead):
            if period >= 0:
                window = yield from self.windows.get(period)
                if window.ended:
                    break
            for action in self.schedule.rows[self.rank]:
                if period + action.step >= 0:
                    yield from self._do(action.at(period + action.step))
            if period >= 0:
                if self.after_step is not None:
                    yield from self.after_step(period, self.windows.known[period])
                self.windows.forget(period)
        self.mailbox.flush()

    def _local_uses(self, work: Action) -> list[Action]:
        """The teacher forwards whose outputs a work takes rows of."""
        if work.op not in (Op.FORWARD, Op.BACKWARD):
            return []
        return [source for block in self.structure.reads(work.role, work.stage) for source, _ in self._sources_of(work, block)]

    def _sources_of(self, work: Action, block: int) -> list[tuple[Action, Part]]:
        """The teacher forwards whose rows `work` takes of a block, with the part of the batch that each has."""
        key = work.at(0), block
        if key not in self.sources:
            units = self.structure.sources(block, self.structure.share_of(work)) if block >= 0 else []
            parts = [self.structure.teacher[block][u].part for u in units]
            forwards = [Action(Role.TEACHER, block, Op.FORWARD, u, 0) for u in units]
            self.sources[key] = list(zip(forwards, parts, strict=True))
        return [(forward.at(work.step), part) for forward, part in self.sources[key]]

    # -- one action -------------------------------------------------------------------------------------------------

    def _do(self, action: Action) -> Waiting:
        """Do one action, unless the data has ended before it.

        At the end of an epoch the last batches of a window may be missing. Tokens and states of blocks travel all the same.
        """
        if action.op is Op.DATA:
            self.windows.do(action)
            return
        window = yield from self.windows.get(action.step)
        if window.ended:
            return
        exists = window.rows[self.structure.share_of(action).batch] > 0
        if action.computes:
            yield from self._wait(action)
            if exists:
                yield from self._compute(action, window)
        elif not self.mailbox.transfer_token(action):
            self._transfer(action, exists)

    def _wait(self, work: Action) -> Waiting:
        """Wait for what `work` comes after, and take over the block that it trains from another rank."""
        yield from self.mailbox.wait_for_tokens(work)
        for receipt in self.mailbox.tokens(work):
            if receipt.at(0) in self.structure.receipts.get(work.at(0), ()):
                sent = work.at(receipt.step).send_to(self.structure.rank_of(receipt))
                self.transport.settle(self.mailbox.message(sent))
        if work.op is Op.BACKWARD:
            before = self.structure.before(work)
            if before.step >= 0 and (before.at(0), self.rank) in self.structure.moves:
                tensors = yield from self.mailbox.receive(before, Lane.STATE)
                self.worker.set_state(work.stage, tensors)

    def _compute(self, work: Action, window: Window) -> Waiting:
        """Do a work, once everything that it comes after is done."""
        if work.op is Op.FORWARD:
            yield from self._forward(work)
        elif work.op is Op.BACKWARD:
            yield from self._train(work, window)
        elif work.op is Op.REDUCE and self.groups is not None:
            with self.recorder.working(work):
                self.worker.reduce(work.stage)
            self._settle_samples(work)
        elif work.op is Op.REDUCE:
            yield from self._add_up_gradients(work)
        else:
            with self.recorder.working(work):
                self.worker.update(work.stage, window.first + self.structure.share_of(work).batch)

    def _forward(self, work: Action) -> Waiting:
        """Run a teacher block forward, over no rows where the batch has too few."""
        value = yield from self._rows(work, work.stage - 1)
        output = None
        if value is not None:
            with self.recorder.working(work):
                output = self.worker.teacher_output(work.stage, value)
        self.mailbox.keep(work, output)

    def _train(self, work: Action, window: Window) -> Waiting:
        """Run forward, loss and backward of a student block."""
        value = yield from self._rows(work, work.stage - 1)
        target = yield from self._rows(work, work.stage)
        share = self.structure.share_of(work)
        total = window.rows[share.batch]
        part = rows_of_part(share.part, total)
        unit = self.structure.of_batch(Role.STUDENT, work.stage, share.batch).index(work.microbatch or 0)
        sharers = [self.structure.rank_of(a) for a in self.structure.sharers(work)]
        group = None
        if self.groups is not None and len(sharers) > 1:
            group = self.groups[tuple(self.ranks[rank] for rank in sharers)]
        weight = (part.stop - part.start) / total
        with self.recorder.working(work):
            self.worker.train(work.stage, value, target, weight, window.first + share.batch, unit, group)
        if self.groups is None and len(sharers) > 1:
            for other in sharers:
                if other != self.rank:
                    self.mailbox.send(work.send_to(other), self.worker.gradients(work.stage), Lane.REDUCE)

    def _add_up_gradients(self, work: Action) -> Waiting:
        """Add up a block's gradients over ranks of one process, in the order of their shares."""
        parts: list[list[Tensor]] = []
        for trained in self.structure.sharers(replace(work, op=Op.BACKWARD)):
            if self.structure.rank_of(trained) == self.rank:
                parts.append(self.worker.gradients(work.stage))
            else:
                parts.append((yield from self.mailbox.receive(trained, Lane.REDUCE)))
        with self.recorder.working(work):
            summed = [torch.stack(tensors).sum(0) for tensors in zip(*parts, strict=True)]
            self.worker.set_gradients(work.stage, summed)

    def _settle_samples(self, reduced: Action) -> None:
        """Let go of sent samples: ranks that have added up gradients of a window have received the window before."""
        if self.windows.source is not None:
            read = Action(Role.STUDENT, 0, Op.DATA, None, reduced.step - 1)
            for other in {self.structure.rank_of(a) for a in self.structure.sharers(reduced)} - {self.rank}:
                self.transport.settle(self.mailbox.message(read.send_to(other), Lane.INPUT))

    # -- rows of teacher blocks -------------------------------------------------------------------------------------

    def _batch_rows(self, action: Action) -> int:
        """Count the rows of the batch of an action."""
        return self.windows.known[action.step].rows[self.structure.share_of(action).batch]

    def _rows(self, work: Action, block: int) -> Generator[Message, None, Any]:
        """The rows that `work` takes of a teacher block's output (-1: of the samples); None where its share has none."""
        total = self._batch_rows(work)
        share = self.structure.share_of(work)
        wanted = rows_of_part(share.part, total)
        pieces = []
        if block < 0 and wanted.start < wanted.stop:
            window = yield from self.windows.get_whole(work.step)
            assert window.inputs is not None
            pieces.append(_take_rows(window.inputs[share.batch], slice(0, total), wanted))
        for source, part in self._sources_of(work, block):
            value, held = yield from self._output(source, part, total)
            inside = slice(max(held.start, wanted.start), min(held.stop, wanted.stop))
            if inside.start < inside.stop:
                pieces.append(_take_rows(value, held, inside))
        if wanted.start == wanted.stop:
            return None
        return pieces[0] if len(pieces) == 1 else _join_rows(self.contracts.outputs[block], pieces)

    def _output(self, source: Action, part: Part, total: int) -> Generator[Message, None, tuple[Any, slice]]:
        """The output of a teacher forward, as far as this rank has it or receives it, and which rows of the batch that is."""
        here = self.structure.rank_of(source) == self.rank
        held = rows_of_part(part if here else self.structure.relays[source.at(0), self.rank], total)
        if source not in self.mailbox.results:
            assert not here, f"{source} was run before"
            value = None
            if held.start < held.stop:
                tensors = yield from self.mailbox.receive_packed(source, self._output_forms(source, held))
                value = self.contracts.outputs[source.stage].join(tensors, held.stop - held.start)
            self.mailbox.keep(source, value)
        return self.mailbox.use(source), held

    def _output_forms(self, forward: Action, rows: slice) -> Forms:
        """The forms of some rows of a teacher block's output; none for no rows."""
        if rows.start == rows.stop:
            return []
        return [(form, rows.stop - rows.start) for form in self.contracts.outputs[forward.stage].values]

    # -- results that travel ----------------------------------------------------------------------------------------

    def _transfer(self, transfer: Action, exists: bool) -> None:
        """Send or announce a block's state, or rows of a teacher block's output where the batch exists."""
        assert transfer.peer is not None
        if self.mailbox.lane_of(transfer) is Lane.STATE:
            self._transfer_state(transfer)
        elif exists and transfer.kind is Kind.SEND:
            value, total = self.mailbox.use(transfer.payload), self._batch_rows(transfer)
            held = rows_of_part(self.structure.share_of(transfer).part, total)
            wanted = rows_of_part(self.structure.relays[transfer.payload.at(0), transfer.peer], total)
            if wanted.start < wanted.stop:
                rows, contract = _take_rows(value, held, wanted), self.contracts.outputs[transfer.stage]
                tensors = contract.split(rows, wanted.stop - wanted.start)
                self.mailbox.send_packed(transfer, tensors, self._output_forms(transfer, wanted))
        elif exists:
            part = self.structure.relays[transfer.payload.at(0), self.rank]
            wanted = rows_of_part(part, self._batch_rows(transfer))
            self.mailbox.post_packed(transfer, self._output_forms(transfer, wanted))

    def _transfer_state(self, transfer: Action) -> None:
        """Send the weights and the optimizer state of a block that another rank trains next, or announce theirs."""
        if transfer.kind is Kind.SEND:
            self.mailbox.send(transfer, [tensor.reshape(-1) for tensor in self.worker.state(transfer.stage)])
        else:
            forms = self.state_forms[transfer.stage]
            device = self.recorder.device
            self.mailbox.post(transfer, [torch.empty(torch.Size(s).numel(), dtype=d, device=device) for s, d in forms])


class _WindowTravel:
    """How windows travel: samples go to the ranks that take rows through the first blocks."""

    def __init__(self, contract: Contract, window: int) -> None:
        self.contract = contract
        self.header_length = header_length(window)

    def from_header(self, header: Tensor) -> Window:
        return Window.from_header(header)

    def to_device(self, data: Window, device: torch.device) -> Window:
        return replace(data, inputs=to_device(data.inputs, device))

    def forms(self, data: Window) -> Forms:
        return [(form, rows) for rows in data.rows if rows for form in self.contract.values]

    def split(self, data: Window) -> list[Tensor]:
        batches = zip(data.inputs or (), data.rows, strict=False)  # there may be fewer than the window has room for
        return [tensor for inputs, rows in batches for tensor in self.contract.split(inputs, rows)]

    def join(self, data: Window, tensors: Sequence[Tensor]) -> Window:
        rest, size = iter(tensors), len(self.contract.values)
        inputs = tuple(self.contract.join([next(rest) for _ in range(size)], rows) for rows in data.rows if rows)
        return replace(data, inputs=inputs)


def _take_rows(value: Any, held: slice, wanted: slice) -> Any:
    """The `wanted` rows of a batch, out of a value that holds some rows of it."""
    if held == wanted:
        return value
    return rows_of(value, slice(wanted.start - held.start, wanted.stop - held.start))


def _join_rows(contract: Contract, pieces: Sequence[Any]) -> Any:
    """Values of consecutive rows as one."""
    counts = [distinct_tensors(piece)[0].shape[0] for piece in pieces]
    columns = zip(*(contract.split(piece, rows) for piece, rows in zip(pieces, counts, strict=True)), strict=True)
    return contract.join([torch.cat(tensors) for tensors in columns], sum(counts))
