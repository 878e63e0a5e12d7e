"""One rank's messages, results, tokens and data, over a transport that only remembers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support.transport import FakeTransport, finish
from torch import Tensor

from pipestill.model.contracts import observe
from pipestill.runtime.mailbox import Forms, Mailbox, StepData
from pipestill.runtime.transport.message import Message
from pipestill.schedule import Action, Kind, Lane, Op, Schedule, generate
from pipestill.schedule.blockwise.generate import alone

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


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Page:
    """The data of a step. Where `lines` (rows, 3) are missing, only their number is known; no rows mark the end."""

    rows: int
    lines: Tensor | None = None

    @property
    def ended(self) -> bool:
        return not self.rows

    def header(self) -> Tensor:
        return torch.tensor([self.rows])


class PageTravel:
    """How pages travel: by lines."""

    header_length = 1
    contract = observe("lines", torch.zeros(3, 2).t(), torch.zeros(3, 3).t())

    def from_header(self, header: Tensor) -> Page:
        return Page(int(header))

    def to_device(self, data: Page, device: torch.device) -> Page:
        return data

    def forms(self, data: Page) -> Forms:
        return [(form, data.rows) for form in self.contract.values] if data.rows else []

    def split(self, data: Page) -> list[Tensor]:
        assert data.lines is not None
        return [data.lines]

    def join(self, data: Page, tensors: Iterable[Tensor]) -> Page:
        (lines,) = tensors
        return replace(data, lines=lines)


READ = Action.parse("S0D@2")


def data_of(rank: int, source: Iterator[Page] | None = None) -> tuple[StepData[Page], FakeTransport]:
    """A rank's view of the data of a pipeline of three ranks, of which 0 reads and 2 has the loss."""
    transport = FakeTransport()
    mail = Mailbox(generate("1f1b", 3, 2), rank, transport, device=CPU, local_uses=uses_of_losses)
    return StepData(mail, source, PageTravel()), transport


def test_data_is_read_once_and_sent_whole_to_who_needs_it() -> None:
    pages = [Page(4, torch.arange(12.0).view(3, 4).t()), Page(0)]
    data, transport = data_of(0, iter(pages))
    for action in (READ, READ.send_to(1), READ.send_to(2)):
        data.do(action)
    assert [(message.lane, message.destination) for message, _ in transport.sent] == [
        (Lane.DATA, 1), (Lane.DATA, 2), (Lane.TARGET, 2),
    ]  # fmt: skip
    assert [tensors[0].tolist() for _, tensors in transport.sent] == [[4], [4], list(range(12))]
    assert finish(data.get(2)) is finish(data.get_whole(2)) is pages[0], "nothing to wait for where it was read"


def test_tensors_for_several_ranks_are_packed_once() -> None:
    transport, schedule = FakeTransport(), alone("dp", 0, 3)
    mail = Mailbox(schedule, 0, transport, device=CPU, local_uses=lambda work: ())
    data = StepData(mail, iter([Page(4, torch.ones(3, 4).t()), Page(2, torch.ones(3, 2).t())]), PageTravel())
    for step in (0, 1):
        for action in (READ.at(step), READ.at(step).send_to(1), READ.at(step).send_to(2)):
            data.do(action)
    first, second, third, fourth = [tensors[0] for message, tensors in transport.sent if message.lane is Lane.INPUT]
    assert first is second and third is fourth
    assert (first.numel(), third.numel()) == (12, 6)


def test_data_of_another_rank_is_awaited_by_header_then_by_tensors() -> None:
    data, transport = data_of(2)
    data.do(READ.receive_from(0))
    header, lines = (Message(lane, READ, 0, 2) for lane in (Lane.DATA, Lane.TARGET))
    assert [(message, tensor.dtype, tensor.numel()) for message, (tensor,) in transport.posted] == [(header, torch.int64, 1)]
    assert next(data.get(2)) == header
    transport.inbox[header] = [torch.tensor([4])]
    assert finish(data.get(2)) == finish(data.get(2)) == Page(4)
    assert [(message, tensor.numel()) for message, (tensor,) in transport.posted[1:]] == [(lines, 12)], "announced once"
    assert next(data.get_whole(2)) == lines
    transport.inbox[lines] = [torch.arange(12.0)]
    whole = finish(data.get_whole(2))
    assert whole.lines.tolist() == torch.arange(12.0).view(3, 4).t().tolist()
    assert finish(data.get_whole(2)) is whole and not transport.inbox
    data.forget(2)
    assert not data.known
    assert next(data.get(2)) == header


def test_a_rank_that_needs_no_tensors_is_told_the_header_only() -> None:
    data, transport = data_of(1)
    transport.inbox[Message(Lane.DATA, READ, 0, 1)] = [torch.tensor([4])]
    assert finish(data.get(2)) == Page(4)
    assert not transport.posted


def test_the_end_of_the_data_has_no_tensors() -> None:
    reader, sent = data_of(0, iter([Page(0)]))
    for action in (READ, READ.send_to(2)):
        reader.do(action)
    assert [message.lane for message, _ in sent.sent] == [Lane.DATA]
    listener, transport = data_of(2)
    transport.inbox[Message(Lane.DATA, READ, 0, 2)] = [torch.tensor([0])]
    assert finish(listener.get(2)).ended
    assert not transport.posted
