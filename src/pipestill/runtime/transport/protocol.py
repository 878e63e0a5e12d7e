"""How results travel between ranks: messages, their tags, and what every transport does with them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pipestill.schedule import Action, Lane, Op, Role

_LANES = list(Lane)
_OPS = list(Op)
_BESIDE = (Lane.TARGET, Lane.INPUT, Lane.REPORT)
"""Lanes whose receives are announced step by step, apart from the schedule."""

UNDER_WAY = 32
"""How many sends of a queue may be on their way before one waits until the oldest has been taken."""

Queue = tuple[int, bool]
"""Segment, and whether beside the schedule. A proved schedule runs even if every send waits for its receive, so waiting for the
oldest is safe; one beside it may be awaited by a rank that first needs more of the schedule.
"""


@dataclass(frozen=True, slots=True)
class Message:
    """One transfer between two ranks.

    `segment` is the part of the run that it belongs to, in which steps count from 0; one executor runs one segment. In a
    pipeline run, training is segment 0 and its validations are 1, 2, ...; in a blockwise run, the segment is the number of
    the phase.
    """

    lane: Lane
    payload: Action
    source: int
    destination: int
    segment: int = 0

    def __str__(self) -> str:
        where = f" of validation or phase {self.segment}" if self.segment else ""
        return f"{self.payload}{where} from rank {self.source} on the {self.lane.value} lane"


def queue_of(message: Message) -> Queue:
    """The queue in which a message waits to be taken."""
    return message.segment, message.lane in _BESIDE


def tag(message: Message, part: int) -> int:
    """A number below 2^31 that differs between all messages that can be under way at once between two ranks."""
    action = message.payload
    microbatch = 0 if action.microbatch is None else action.microbatch + 1
    if message.lane in (Lane.TEACHER, Lane.TOKEN, Lane.STATE):
        microbatch += 131 * action.stage  # blocks that learn alone share lanes; messages of one tag keep their order
    number = 1 + (message.segment - 1) % 7 if message.segment else 0  # a validation may never be taken for training
    number = number * len(_LANES) + _LANES.index(message.lane)
    number = number * 2 + (action.role is Role.TEACHER)
    number = number * len(_OPS) + _OPS.index(action.op)
    number = number * 64 + action.step % 64
    number = number * 1024 + microbatch % 1024
    return number * 16 + part % 16


Waiting = Generator[Message, None, None]
"""A rank's work as a generator: it yields the message that it waits for, and is resumed to look again."""


def receive(transport: Transport, message: Message) -> Generator[Message, None, list[Tensor]]:
    """Wait for a message and take its tensors."""
    while not transport.arrived(message):
        yield message
    return transport.take(message)


class Transport(Protocol):
    """One rank's end of every lane. Tensors arrive as they were sent, in order on each lane."""

    def send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        """Start sending; the tensors must not change until they have arrived."""

    def post(self, message: Message, buffers: Sequence[Tensor]) -> None:
        """Announce a receive into `buffers`, which fixes the shapes and types that both ends agreed on."""

    def arrived(self, message: Message) -> bool:
        """Whether a posted message is here. May wait for it, up to a deadline, then raises `TransportError`."""

    def take(self, message: Message) -> list[Tensor]:
        """The tensors of a message that has arrived."""

    def settle(self, message: Message) -> None:
        """Let go of `message`, which its receiver is known to have, and of those that it was sent before on the same lane."""

    def flush(self, segment: int) -> None:
        """Wait until everything sent in `segment` has left, and everything announced in it has arrived."""
