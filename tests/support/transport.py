"""A transport that only remembers, for tests of what runs above one."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from torch import Tensor

from pipestill.runtime.transport.message import Message


class FakeTransport:
    """Keeps what is sent and announced, in order; a test says what has arrived."""

    def __init__(self) -> None:
        self.sent: list[tuple[Message, list[Tensor]]] = []
        self.posted: list[tuple[Message, list[Tensor]]] = []
        self.inbox: dict[Message, list[Tensor]] = {}
        self.settled: list[Message] = []
        self.flushed: list[int] = []

    def send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        self.sent.append((message, list(tensors)))

    def post(self, message: Message, buffers: Sequence[Tensor]) -> None:
        self.posted.append((message, list(buffers)))

    def arrived(self, message: Message) -> bool:
        return message in self.inbox

    def take(self, message: Message) -> list[Tensor]:
        return self.inbox.pop(message)

    def settle(self, message: Message) -> None:
        self.settled.append(message)

    def flush(self, segment: int) -> None:
        self.flushed.append(segment)


def finish(waiting: Generator[Message, None, Any]) -> Any:
    """What a generator returns that has nothing to wait for."""
    try:
        message = next(waiting)
    except StopIteration as end:
        return end.value
    raise AssertionError(f"waits for {message}")
