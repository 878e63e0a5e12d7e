"""What a rank knows of the data of each step: read on one rank, announced to all, sent whole to those that need it."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from pipestill.runtime.mailbox import Forms, Mailbox
from pipestill.runtime.transport.protocol import Message
from pipestill.schedule import Action, Kind, Op, Role


class Header(Protocol):
    """The data of one step: a batch, or a window of batches."""

    @property
    def ended(self) -> bool:
        """Whether there is no data left."""

    def header(self) -> Tensor:
        """What every rank has to know of it, as whole numbers."""


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

    def is_whole(self, data: D) -> bool:
        """Whether the tensors are there."""


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
        """What this rank knows of a step's data; waits for its header where another rank reads it."""
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
        if not self.travel.is_whole(data) and self.source is None:
            lane = self.structure.batch_lane(self.mailbox.rank)
            tensors = yield from self.mailbox.receive_packed(_read(step), self.travel.forms(data), lane)
            data = self.known[step] = self.travel.join(data, tensors)
        return data

    def forget(self, step: int) -> None:
        """Let go of the data of a step that is over."""
        self.known.pop(step, None)


def _read(step: int) -> Action:
    return Action(Role.STUDENT, 0, Op.DATA, None, step)
