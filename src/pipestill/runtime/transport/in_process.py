"""The transport between ranks that take turns in one process: a dictionary is the network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipestill.runtime.transport.protocol import Message


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
