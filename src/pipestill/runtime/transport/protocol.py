"""How results travel between ranks: messages and their tags, what every transport does with them, what connects the ranks.

The transport between ranks of one process is here too; those between processes are in modules of their own.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from pipestill.schedule import Action, Lane, Op, Role

T = TypeVar("T")

_LANES = list(Lane)
_OPS = list(Op)
_BESIDE = (Lane.TARGET, Lane.INPUT, Lane.REPORT)
"""Lanes whose receives are announced step by step, apart from the schedule."""

_SHARED_BY_STAGES = (Lane.TEACHER, Lane.TOKEN, Lane.STATE)
"""Lanes between two ranks that carry results of several stages or blocks."""

# How many values of each kind a tag tells apart; their product, with lanes, roles and ops, stays below 2^31.
_SEGMENTS = 8  # 0, and 7 for the others in turn: a validation may never be taken for training
_STEPS = 64  # more than are ever under way at once
_MICROBATCHES = 1024  # and one for none
_PARTS = 16  # tensors of a message; later ones keep their order behind those of the same tag
_STAGE_STRIDE = 131  # spreads the microbatches of the stages that share a lane

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
    """The number, below 2^31, by which gloo matches a tensor of a message with its receive.

    It differs between lanes, segments, and steps that are under way at once. Two messages of one lane and step have the same tag
    only where there are more than `_MICROBATCHES`; that is safe, since receives of a lane are posted in the order of its sends.
    """
    action = message.payload
    segment = 1 + (message.segment - 1) % (_SEGMENTS - 1) if message.segment else 0
    microbatch = 0 if action.microbatch is None else action.microbatch + 1
    if message.lane in _SHARED_BY_STAGES:
        microbatch += _STAGE_STRIDE * action.stage
    number = 0
    for digit, base in (
        (segment, _SEGMENTS), (_LANES.index(message.lane), len(_LANES)), (action.role is Role.TEACHER, 2),
        (_OPS.index(action.op), len(_OPS)), (action.step, _STEPS), (microbatch, _MICROBATCHES), (part, _PARTS),
    ):  # fmt: skip
        number = number * base + digit % base
    return number


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


class InProcess:
    """One rank's end of every lane. All ranks share `boxes`, which holds what was sent and not yet taken."""

    def __init__(self, boxes: dict[Message, list[Tensor]]) -> None:
        self.boxes = boxes

    def send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        """Put copies into the box: as between processes, the receiver may write to what it gets."""
        self.boxes[message] = [tensor.clone() for tensor in tensors]

    def post(self, message: Message, buffers: Sequence[Tensor]) -> None:
        """Do nothing: no buffer is needed here, since the copies themselves are handed over."""

    def arrived(self, message: Message) -> bool:
        """Whether the message has been sent. Never waits: the world lets other ranks go on until it has."""
        return message in self.boxes

    def take(self, message: Message) -> list[Tensor]:
        """The tensors of a message that has arrived."""
        return self.boxes.pop(message)

    def settle(self, message: Message) -> None:
        """Do nothing: the sender keeps nothing."""

    def flush(self, segment: int) -> None:
        """Do nothing: a message is there as soon as it is sent."""


class World(Protocol):
    """The ranks of a run, and what they do together outside the schedule."""

    num_ranks: int
    ranks: Sequence[int]
    """The ranks that live in this process."""

    @property
    def is_main(self) -> bool:
        """Whether rank 0, which reads data and reports, lives here."""

    def transport(self, rank: int, edges: Iterable[tuple[int, int, Lane]], timeout_seconds: float) -> Transport:
        """Open a rank's end of every lane; all ranks call this together."""

    def backend(self, device_type: str) -> str:
        """The name of what moves tensors between the ranks, once there is a transport."""

    def drive(self, runs: Sequence[Waiting]) -> None:
        """Run the generators of this process's ranks to their end."""

    def broadcast(self, value: T | None, rank: int = 0) -> T:
        """Give the value of `rank` to every process."""

    def gather(self, values: Sequence[T]) -> list[T]:
        """Collect one value of each rank, in their order, on the process of rank 0; elsewhere the list is empty."""

    def copy_from(self, tensors: Sequence[Tensor], rank: int) -> None:
        """Overwrite the CPU `tensors` of all processes with those of `rank`."""

    def barrier(self) -> None:
        """Wait until every process is here."""

    def claim(self, name: str) -> bool:
        """Claim `name`; True for the first rank that does."""
