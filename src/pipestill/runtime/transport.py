"""How results travel between ranks: the protocol, and its form for ranks that share one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pipestill.schedule import Action, Lane


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
