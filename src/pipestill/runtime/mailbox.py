"""One rank's mailbox: its messages, the results that it keeps until their last use, the tokens that it waits for, and data.

The data of each step is read on one rank, announced to all, and sent whole to those that need it.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from pipestill.model.contracts import TensorForm
from pipestill.runtime.transport.message import Message
from pipestill.runtime.transport.protocol import Transport, Waiting, receive
from pipestill.schedule import Action, Kind, Lane, Op, Role, Schedule
from pipestill.schedule.structure import lane, needs

Receiving = Generator[Message, None, list[Tensor]]
"""Waits for a message, and returns its tensors."""

Forms = Sequence[tuple[TensorForm, int]]
"""The form and the number of rows of each tensor of a message."""

_RESULT_LANES = (Lane.TEACHER, Lane.ACTIVATION, Lane.GRADIENT, Lane.TIE, Lane.NORM)
"""Lanes whose messages carry the result of a work; the others carry the batch, the order, or what belongs to no result."""


@dataclass(eq=False)
class Mailbox:
    """What one rank sends, receives and keeps while an executor walks its row of a schedule.

    - A *result* is kept from the work that gave it until its last use on this rank. Its uses are counted beforehand: its
      sends in the row, and those that `local_uses(work)` names for each work of the row.
    - A *message* carries a result, or part of a batch. Its receive is posted where the row says so; `receive` waits.
    - A *token* is a message that carries nothing but the order: a work waits for the tokens of what it needs from other
      ranks when no tensor of theirs tells it.

    The schedule counts ranks from 0; `ranks` says which of the world they are, if others.
    """

    schedule: Schedule[Any]
    rank: int
    transport: Transport
    device: torch.device
    local_uses: Callable[[Action], Iterable[Action]]
    segment: int = 0
    ranks: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self.structure = self.schedule.structure
        self.world_ranks = self.ranks or range(self.structure.num_ranks)
        row = self.schedule.rows[self.rank]
        works = [action.at(0) for action in row if action.computes and action.op is not Op.DATA]
        self.uses = Counter(result.at(0) for work in works for result in self.local_uses(work))
        """How often this rank uses the result of each work of a step."""
        self.uses.update(a.payload.at(0) for a in row if a.kind is Kind.SEND and self.lane_of(a) in _RESULT_LANES)
        self.results: dict[Action, tuple[Any, int]] = {}
        """By work whose result is kept: the result, and how many uses are left."""
        awaited = {a.payload.at(0) for a in row if a.kind is Kind.RECEIVE and self.lane_of(a) is Lane.TOKEN}
        self.token_needs = {
            work: [need for need in needs(work, self.structure) if need.at(0) in awaited] for work in (works if awaited else [])
        }
        """By work of step 0: what it needs whose token comes from another rank."""
        self.token_uses = Counter(need.at(0) for mine in self.token_needs.values() for need in mine)
        self.tokens_left: dict[Action, int] = {}
        """By token that has arrived: how many works are still to ask for it."""

    # -- results ----------------------------------------------------------------------------------------------------

    def keep(self, work: Action, result: Any) -> None:
        """Keep the result of `work` for its uses on this rank, if it has any."""
        uses = self.uses[work.at(0)]
        if uses:
            self.results[work] = result, uses

    def has(self, work: Action) -> bool:
        """Whether the result of `work` is kept."""
        return work in self.results

    def use(self, work: Action) -> Any:
        """The result of `work`, which is let go of after its last use."""
        result, uses = self.results.pop(work)
        if uses > 1:
            self.results[work] = result, uses - 1
        return result

    # -- messages ---------------------------------------------------------------------------------------------------

    def lane_of(self, transfer: Action) -> Lane:
        """The lane on which a send or a receive of this rank travels."""
        destination = transfer.peer if transfer.kind is Kind.SEND else self.rank
        assert destination is not None
        return lane(transfer, destination, self.structure)

    def message(self, transfer: Action, on: Lane | None = None) -> Message:
        """The message of a send or a receive of this rank, on its own lane unless another is given."""
        assert transfer.peer is not None
        mine, theirs = self.world_ranks[self.rank], self.world_ranks[transfer.peer]
        source, destination = (mine, theirs) if transfer.kind is Kind.SEND else (theirs, mine)
        return Message(on or self.lane_of(transfer), transfer.payload, source, destination, self.segment)

    def send(self, transfer: Action, tensors: Sequence[Tensor], on: Lane | None = None) -> None:
        """Send tensors as they are."""
        self.transport.send(self.message(transfer, on), tensors)

    def post(self, transfer: Action, buffers: Sequence[Tensor], on: Lane | None = None) -> None:
        """Announce that this rank will receive tensors like `buffers`."""
        self.transport.post(self.message(transfer, on), buffers)

    def receive(self, work: Action, on: Lane | None = None) -> Receiving:
        """Wait for the result of another rank's `work`."""
        transfer = work.receive_from(self.structure.rank_of(work))
        return (yield from receive(self.transport, self.message(transfer, on)))

    def send_packed(self, transfer: Action, tensors: Sequence[Tensor], forms: Forms, on: Lane | None = None) -> None:
        """Send tensors of known forms, each packed into one axis; nothing where there are none."""
        packed = [form.pack(tensor, rows) for tensor, (form, rows) in zip(tensors, forms, strict=True)]
        if packed:
            self.send(transfer, packed, on)

    def post_packed(self, transfer: Action, forms: Forms, on: Lane | None = None) -> None:
        """Announce that this rank will receive tensors of known forms; nothing where there are none."""
        if forms:
            self.post(transfer, [form.empty(rows, self.device) for form, rows in forms], on)

    def receive_packed(self, work: Action, forms: Forms, on: Lane | None = None) -> Receiving:
        """Wait for tensors of known forms; no wait where there are none."""
        if not forms:
            return []
        packed = yield from self.receive(work, on)
        return [form.unpack(tensor, rows) for tensor, (form, rows) in zip(packed, forms, strict=True)]

    def flush(self) -> None:
        """Wait until all that this rank has sent has left."""
        self.transport.flush(self.segment)

    # -- tokens -----------------------------------------------------------------------------------------------------

    def transfer_token(self, transfer: Action) -> bool:
        """Send a token, or announce that one will be received; False where `transfer` is of something else."""
        if self.lane_of(transfer) is not Lane.TOKEN:
            return False
        token = [torch.zeros(1, device=self.device)]
        if transfer.kind is Kind.SEND:
            self.send(transfer, token)
        else:
            self.post(transfer, token)
        return True

    def tokens(self, work: Action) -> list[Action]:
        """The works of other ranks whose tokens `work` waits for."""
        found = (need.at(need.step + work.step) for need in self.token_needs.get(work.at(0), ()))
        return [need for need in found if need.step >= 0]

    def wait_for_tokens(self, work: Action) -> Waiting:
        """Wait until the other ranks have done what `work` needs only to come after."""
        for need in self.tokens(work):
            if need not in self.tokens_left:
                yield from self.receive(need, Lane.TOKEN)
                self.tokens_left[need] = self.token_uses[need.at(0)]
            self.tokens_left[need] -= 1
            if not self.tokens_left[need]:
                del self.tokens_left[need]


class Header(Protocol):
    """The data of one step: a batch, or a window of batches."""

    @property
    def ended(self) -> bool:
        """Whether there is no data left."""

    def header(self) -> Tensor:
        """Give what every rank has to know of the data, as whole numbers."""


D = TypeVar("D", bound=Header)


class Travel(Protocol[D]):
    """How a step's data goes from the rank that reads it to the others.

    Its *tensors* are those that some ranks need: the targets of a batch, or the samples of a window.
    """

    header_length: int

    def from_header(self, header: Tensor) -> D:
        """The data as a rank knows it that was sent its header only."""

    def to_device(self, data: D, device: torch.device) -> D:
        """The data as it was read, with its tensors on a device."""

    def forms(self, data: D) -> Forms:
        """The forms of the tensors that travel; none after the end of the data."""

    def split(self, data: D) -> Sequence[Tensor]:
        """The tensors that travel, of data that was read on this rank."""

    def join(self, data: D, tensors: Sequence[Tensor]) -> D:
        """The data together with its tensors."""


@dataclass(eq=False)
class StepData(Generic[D]):
    """The data of every step under way, as far as one rank knows it.

    `source` gives them, and never ends, on the rank that reads them; it is None elsewhere. That rank sends each step's header to
    all others where the schedule says so, and the tensors after it to ranks for which the structure names a lane.
    """

    mailbox: Mailbox
    source: Iterator[D] | None
    travel: Travel[D]

    def __post_init__(self) -> None:
        self.structure = self.mailbox.structure
        self.known: dict[int, D] = {}
        """By step."""
        self._whole = set[int]()
        """The steps whose tensors have come."""
        self._packed: tuple[int, list[Tensor]] = -1, []
        """The step whose tensors were sent last, and these as they travel: the same to one rank after the other."""

    def do(self, action: Action) -> None:
        """Do one action of the schedule on data: read, send, or announce that this rank waits for a header."""
        if action.computes:
            assert self.source is not None, "the rank that reads the data has a source"
            self.known[action.step] = self.travel.to_device(next(self.source), self.mailbox.device)
        elif action.kind is Kind.RECEIVE:
            self.mailbox.post(action, [torch.empty(self.travel.header_length, dtype=torch.int64)])
        else:
            self._send(action)

    def _send(self, transfer: Action) -> None:
        data = self.known[transfer.step]
        self.mailbox.send(transfer, [data.header()])
        assert transfer.peer is not None
        lane, forms = self.structure.batch_lane(transfer.peer), self.travel.forms(data)
        if lane is not None and forms:
            if self._packed[0] != transfer.step:
                tensors = zip(self.travel.split(data), forms, strict=True)
                self._packed = transfer.step, [form.pack(tensor, rows) for tensor, (form, rows) in tensors]
            self.mailbox.send(transfer, self._packed[1], lane)

    def get(self, step: int) -> Generator[Message, None, D]:
        """Give what this rank knows of a step's data; waits for its header where another rank reads it."""
        if step not in self.known:
            read = _read(step)
            (header,) = yield from self.mailbox.receive(read)
            data = self.known[step] = self.travel.from_header(header)
            lane = self.structure.batch_lane(self.mailbox.rank)
            if lane is not None:
                self.mailbox.post_packed(read.receive_from(self.structure.rank_of(read)), self.travel.forms(data), lane)
        return self.known[step]

    def get_whole(self, step: int) -> Generator[Message, None, D]:
        """A step's data with its tensors, on a rank that needs them; waits for them where another rank reads them."""
        data = self.known[step]
        if self.source is None and step not in self._whole:
            lane = self.structure.batch_lane(self.mailbox.rank)
            tensors = yield from self.mailbox.receive_packed(_read(step), self.travel.forms(data), lane)
            data = self.known[step] = self.travel.join(data, tensors)
            self._whole.add(step)
        return data

    def forget(self, step: int) -> None:
        """Let go of the data of a step that is over."""
        self.known.pop(step, None)
        self._whole.discard(step)


def _read(step: int) -> Action:
    return Action(Role.STUDENT, 0, Op.DATA, None, step)
