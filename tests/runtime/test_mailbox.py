"""One rank's messages, results and tokens, over a transport that only remembers."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from support.transport import FakeTransport, finish

from pipestill.model.contracts import observe
from pipestill.runtime.mailbox import Mailbox
from pipestill.runtime.transport.protocol import Message
from pipestill.schedule import Action, Kind, Lane, Op, Schedule, generate

CPU = torch.device("cpu")
FORWARD = Action.parse("S0F0@2")


def uses_of_losses(work: Action) -> Iterable[Action]:
    """The last student stage's output, as a loss on its rank uses it."""
    return [Action.parse(f"S1F{work.microbatch}@0")] if work.op is Op.LOSS else []


def mailbox(rank: int, strategy: str = "1f1b", **rest: Any) -> tuple[Mailbox, FakeTransport, Schedule[Any]]:
    transport, schedule = FakeTransport(), generate(strategy, 2, 2)
    return Mailbox(schedule, rank, transport, device=CPU, local_uses=uses_of_losses, **rest), transport, schedule


def test_result_is_kept_until_its_last_use() -> None:
    mail, _, _ = mailbox(1)
    work = Action.parse("S1F0@3")
    mail.keep(work, "output")
    assert mail.use(work) == "output"
    assert not mail.results


def test_result_without_uses_is_not_kept() -> None:
    mail, _, _ = mailbox(0)
    mail.keep(Action.parse("S0U@3"), "nobody asks")
    assert not mail.results


def test_every_use_is_counted_whatever_the_step() -> None:
    mail, _, schedule = mailbox(0)
    sends = [a.payload.at(0) for a in schedule.rows[0] if a.kind is Kind.SEND and a.op is Op.FORWARD]
    for step in (0, 5):
        for work in set(sends):
            mail.keep(work.at(step), step)
            for _ in range(sends.count(work)):
                assert mail.use(work.at(step)) == step
    assert not mail.results


def test_messages_name_ranks_as_the_world_does_and_their_segment() -> None:
    mail, transport, _ = mailbox(0, ranks=(4, 7), segment=3)
    mail.send(FORWARD.send_to(1), [torch.ones(2)])
    mail.post(Action.parse("S1B0@2").receive_from(1), [torch.empty(2)])
    (sent, _), (posted, _) = transport.sent[0], transport.posted[0]
    assert sent == Message(Lane.ACTIVATION, FORWARD, 4, 7, 3)
    assert posted == Message(Lane.GRADIENT, Action.parse("S1B0@2"), 7, 4, 3)
    mail.flush()
    assert transport.flushed == [3]


def test_receive_waits_for_its_message_only() -> None:
    mail, transport, _ = mailbox(1)
    expected = Message(Lane.ACTIVATION, FORWARD, 0, 1)
    waiting = mail.receive(FORWARD)
    assert next(waiting) == expected
    transport.inbox[Message(Lane.ACTIVATION, FORWARD.at(3), 0, 1)] = []
    assert next(waiting) == expected
    transport.inbox[expected] = [torch.ones(2)]
    with pytest.raises(StopIteration) as end:
        next(waiting)
    assert end.value.value[0].tolist() == [1, 1]


def test_packed_tensors_come_back_with_their_strides() -> None:
    few, more = torch.zeros(5, 2).t(), torch.zeros(5, 3).t()
    forms = [(form, 4) for form in observe("here", few, more).values]
    mail, transport, _ = mailbox(0)
    tensor = torch.arange(20.0).view(5, 4).t()
    mail.send_packed(FORWARD.send_to(1), [tensor], forms)
    mail.post_packed(Action.parse("S1B0@2").receive_from(1), forms)
    assert transport.sent[0][1][0].shape == transport.posted[0][1][0].shape == (20,)
    other, transport_there, _ = mailbox(1)
    transport_there.inbox[transport.sent[0][0]] = transport.sent[0][1]
    (got,) = finish(other.receive_packed(FORWARD, forms))
    assert torch.equal(got, tensor)
    assert got.stride() == tensor.stride()


def test_nothing_travels_where_there_are_no_tensors() -> None:
    mail, transport, _ = mailbox(0)
    mail.send_packed(FORWARD.send_to(1), [], [])
    mail.post_packed(FORWARD.receive_from(1), [])
    assert finish(mail.receive_packed(FORWARD, [])) == []
    assert not transport.sent
    assert not transport.posted


def test_a_tensor_that_nobody_announced_is_an_error() -> None:
    mail, _, _ = mailbox(0)
    with pytest.raises(ValueError, match="zip"):
        mail.send_packed(FORWARD.send_to(1), [torch.ones(1)], [])


def test_token_is_awaited_once_and_forgotten_after_its_last_use() -> None:
    mail, transport, schedule = mailbox(0, "sequential")
    received = [a for a in schedule.rows[0] if a.kind is Kind.RECEIVE and mail.lane_of(a) is Lane.TOKEN]
    assert received
    assert all(mail.transfer_token(a) for a in received)
    assert [message.lane for message, _ in transport.posted] == [Lane.TOKEN] * len(received)
    waiting_works = [work for work in mail.token_needs if mail.tokens(work.at(4))]
    assert waiting_works
    for work in waiting_works:
        for token in mail.tokens(work.at(4)):
            if token not in mail.tokens_left:
                message = Message(Lane.TOKEN, token, 1, 0)
                assert next(mail.wait_for_tokens(work.at(4))) == message
                transport.inbox[message] = [torch.zeros(1)]
        finish(mail.wait_for_tokens(work.at(4)))
    assert not mail.tokens_left
    assert not transport.inbox


def test_tokens_of_steps_before_the_first_are_not_awaited() -> None:
    mail, _, _ = mailbox(0, "sequential")
    assert all(token.step >= 0 for work in mail.token_needs for token in mail.tokens(work))


def test_a_transfer_that_carries_a_tensor_is_no_token() -> None:
    mail, transport, _ = mailbox(0)
    assert not mail.transfer_token(FORWARD.send_to(1))
    assert not transport.sent
    assert not mail.token_needs
