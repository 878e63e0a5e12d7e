"""How results travel between ranks: the protocol, and its form for ranks that share one process."""

from __future__ import annotations

from collections.abc import Sequence
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
"""Phase, and whether beside the schedule. A proved schedule runs even if every send waits for its receive, so waiting for the
oldest is safe; one beside it may be awaited by a rank that first needs more of the schedule.
"""


@dataclass(frozen=True, slots=True)
class Message:
    """One transfer. `phase` tells training (0) from the validations (1, 2, ...), whose steps count anew."""

    lane: Lane
    payload: Action
    source: int
    destination: int
    phase: int = 0

    def __str__(self) -> str:
        where = f" of validation {self.phase}" if self.phase else ""
        return f"{self.payload}{where} from rank {self.source} on the {self.lane.value} lane"


def queue_of(message: Message) -> Queue:
    """The queue in which a message waits to be taken."""
    return message.phase, message.lane in _BESIDE


def tag(message: Message, part: int) -> int:
    """A number below 2^31 that differs between all messages that can be under way at once between two ranks."""
    action = message.payload
    microbatch = 0 if action.microbatch is None else action.microbatch + 1
    if message.lane in (Lane.TEACHER, Lane.TOKEN, Lane.STATE):
        microbatch += 131 * action.stage  # blocks that learn alone share lanes; messages of one tag keep their order
    number = 1 + (message.phase - 1) % 7 if message.phase else 0  # a validation may never be taken for training
    number = number * len(_LANES) + _LANES.index(message.lane)
    number = number * 2 + (action.role is Role.TEACHER)
    number = number * len(_OPS) + _OPS.index(action.op)
    number = number * 64 + action.step % 64
    number = number * 1024 + microbatch % 1024
    return number * 16 + part % 16


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

    def flush(self, phase: int) -> None:
        """Wait until everything sent in `phase` has left, and everything announced is here."""


class InProcess:
    """All ranks in one process: a dictionary is the network. Share one `boxes` between the ranks."""

    def __init__(self, boxes: dict[Message, list[Tensor]]) -> None:
        self.boxes = boxes

    def send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        self.boxes[message] = [tensor.clone() for tensor in tensors]  # as in another process, the receiver's own

    def post(self, message: Message, buffers: Sequence[Tensor]) -> None:
        """Nothing to announce: what is sent brings its own buffer."""

    def arrived(self, message: Message) -> bool:
        return message in self.boxes

    def take(self, message: Message) -> list[Tensor]:
        return self.boxes.pop(message)

    def settle(self, message: Message) -> None:
        """Nothing is kept."""

    def flush(self, phase: int) -> None:
        """Nothing is ever under way."""
