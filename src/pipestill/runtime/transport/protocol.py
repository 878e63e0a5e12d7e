"""What every transport does with messages, and what connects the ranks.

The transport between ranks of one process is here too; those between processes are in modules of their own.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from pipestill.runtime.transport.message import Message
from pipestill.schedule import Lane

T = TypeVar("T")

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
