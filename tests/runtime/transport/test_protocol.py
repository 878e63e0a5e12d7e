"""Messages in one process arrive as they were sent."""

import torch
from support.targets import message

from pipestill.runtime.transport.protocol import InProcess
from pipestill.schedule import Lane


def test_what_is_sent_arrives() -> None:
    boxes: dict = {}
    sender, receiver = InProcess(boxes), InProcess(boxes)
    one, other = message("S0F1@2"), message("S0F1@2", Lane.TEACHER)
    assert not receiver.arrived(one)
    receiver.post(one, [torch.empty(3)])
    sender.send(one, [torch.ones(3), torch.zeros(2)])
    sender.flush(0)
    assert receiver.arrived(one)
    assert not receiver.arrived(other)
    first, second = receiver.take(one)
    assert first.tolist() == [1, 1, 1] and second.tolist() == [0, 0]
    assert not receiver.arrived(one)
    assert not boxes


def test_the_receiver_may_write_to_what_it_gets() -> None:
    """Sender and receiver must not share memory: in another process they would not."""
    boxes: dict = {}
    tensor = torch.ones(3)
    InProcess(boxes).send(message("S0F1@2"), [tensor])
    (arrived,) = InProcess(boxes).take(message("S0F1@2"))
    arrived.zero_()
    assert tensor.tolist() == [1, 1, 1]
