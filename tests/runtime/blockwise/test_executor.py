"""What a rank does with its row of a blockwise schedule, over a transport and with blocks that only remember."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from schedule.blockwise.tasks import RELAY, half_a_block_moves
from support.transport import FakeTransport, finish
from torch import Tensor

from pipestill.model.blockwise.task import BlockwiseContracts
from pipestill.model.contracts import observe
from pipestill.runtime.batch import Batch, windows
from pipestill.runtime.blockwise.executor import BlockwiseExecutor
from pipestill.runtime.record import Recorder
from pipestill.runtime.transport.message import Message
from pipestill.runtime.transport.protocol import Transport
from pipestill.runtime.world import OneProcess
from pipestill.schedule import Action, Lane, Schedule
from pipestill.schedule.blockwise.generate import alone, staged

CPU = torch.device("cpu")
WIDTH = 3
ROWS = observe("rows", torch.zeros(2, WIDTH), torch.zeros(3, WIDTH))


class Notes:
    """Blocks that note what is asked of them. A teacher block adds 1 to its input; a student's state counts its updates."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.updates: dict[int, float] = {}
        self.summed: list[list[float]] = []

    def teacher_output(self, block: int, value: Tensor) -> Tensor:
        self.calls.append(f"teacher {block} of {len(value)}")
        return value + 1

    def train(self, block: int, value: Any, target: Any, weight: float, batch: int, unit: int, group: Any) -> None:
        rows = 0 if value is None else len(value)
        assert (value is None and target is None) or torch.equal(target, value + 1), "the same rows"
        self.calls.append(f"train {block} on {rows} of batch {batch} by {weight:.2f}")

    def reduce(self, block: int) -> None:
        raise AssertionError("only process groups reduce")

    def gradients(self, block: int) -> list[Tensor]:
        return [torch.ones(2)]

    def set_gradients(self, block: int, summed: Sequence[Tensor]) -> None:
        self.summed.append(summed[0].tolist())

    def update(self, block: int, batch: int) -> None:
        assert self.updates.setdefault(block, 0.0) == batch, "the weights of the batch before"
        self.updates[block] += 1
        self.calls.append(f"update {block} after batch {batch}")

    def state_forms(self, block: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [((1,), torch.float32)]

    def state(self, block: int) -> list[Tensor]:
        return [torch.tensor([self.updates[block]])]

    def set_state(self, block: int, tensors: Sequence[Tensor]) -> None:
        self.calls.append(f"take over {block}")
        self.updates[block] = tensors[0].item()


def executor(
    schedule: Schedule[Any], rank: int, transport: Transport, rows: Sequence[int] | None = None, **rest: Any
) -> tuple[BlockwiseExecutor, Notes]:
    """One rank's executor. With `rows`, it reads an epoch of batches with so many."""
    notes = Notes()
    batches = (Batch(n, 0, i + 1 == len(rows or ()), torch.zeros(n, WIDTH)) for i, n in enumerate(rows or ()))
    made = BlockwiseExecutor(
        schedule, rank, range(schedule.structure.num_ranks), notes,
        BlockwiseContracts(ROWS, (ROWS,) * len(schedule.structure.teacher), frozenset(), frozenset()),
        transport, Recorder(rank, CPU), None if rows is None else windows(batches, schedule.structure.window),
        groups=None, **rest,
    )  # fmt: skip
    return made, notes


def drive(schedule: Schedule[Any], rows: Sequence[int]) -> tuple[list[BlockwiseExecutor], list[Notes]]:
    """All ranks of a schedule, run in turn to their end."""
    world, made = OneProcess(schedule.structure.num_ranks), []
    for rank in world.ranks:
        made.append(executor(schedule, rank, world.transport(rank, [], 1.0), None if rank else rows))
    world.drive([one.run() for one, _ in made])
    return [one for one, _ in made], [notes for _, notes in made]


def test_the_first_rank_of_a_relay_goes_by_its_row_and_relays_its_output() -> None:
    transport, steps = FakeTransport(), list[int]()

    def after(step: int, window: Any) -> Any:
        steps.append(step)
        yield from ()

    made, notes = executor(staged("relay", RELAY), 0, transport, [4, 2], after_step=after, segment=5)
    finish(made.run())
    assert notes.calls == [
        "teacher 0 of 4", "train 0 on 4 of batch 0 by 1.00", "update 0 after batch 0",
        "teacher 0 of 2", "train 0 on 2 of batch 1 by 1.00", "update 0 after batch 1",
    ]  # fmt: skip
    relayed = [(message, tensors[0].tolist()) for message, tensors in transport.sent if message.lane is Lane.TEACHER]
    forward = Action.parse("T0F0@0")
    assert relayed == [
        (Message(Lane.TEACHER, forward, 0, 1, 5), [1.0] * 4 * WIDTH),
        (Message(Lane.TEACHER, forward.at(1), 0, 1, 5), [1.0] * 2 * WIDTH),
    ]
    assert steps == [0, 1]
    assert not made.mailbox.results and transport.flushed == [5]


def test_a_later_rank_waits_for_the_header_then_for_rows() -> None:
    transport = FakeTransport()
    made, notes = executor(staged("relay", RELAY), 1, transport)
    run = made.run()
    header = Message(Lane.DATA, Action.parse("S0D@0"), 0, 1)
    assert next(run) == header
    transport.inbox[header] = [torch.tensor([0, 0, 1, 4])]
    transport.inbox[Message(Lane.DATA, Action.parse("S0D@1"), 0, 1)] = [torch.tensor([1, 0, 1, 0])]
    rows = Message(Lane.TEACHER, Action.parse("T0F0@0"), 0, 1)
    assert next(run) == rows
    assert [tensors[0].numel() for message, tensors in transport.posted if message == rows] == [4 * WIDTH]
    assert not notes.calls
    transport.inbox[rows] = [torch.zeros(4 * WIDTH)]
    finish(run)
    assert notes.calls == ["teacher 1 of 4", "train 1 on 4 of batch 0 by 1.00", "update 1 after batch 0"]
    assert transport.flushed == [0]


def test_ranks_that_share_a_batch_add_up_gradients_also_where_one_has_no_rows() -> None:
    made, (first, second) = drive(alone("dp", 0, 2), [5, 1])
    trained = [[call for call in notes.calls if "train" in call] for notes in (first, second)]
    assert trained == [
        ["train 0 on 2 of batch 0 by 0.40", "train 0 on 0 of batch 1 by 0.00"],
        ["train 0 on 3 of batch 0 by 0.60", "train 0 on 1 of batch 1 by 1.00"],
    ]
    assert first.summed == second.summed == [[2.0, 2.0]] * 2
    assert first.updates == second.updates == {0: 2.0}
    assert not any(one.mailbox.results for one in made)


@pytest.mark.parametrize("teacher_first", [True, False])
@pytest.mark.parametrize("num_batches", [4, 5])
def test_a_block_that_moves_takes_its_updates_along(teacher_first: bool, num_batches: int) -> None:
    """Also where a window lacks its second batch: what then is not trained moves all the same."""
    made, (first, second) = drive(half_a_block_moves(teacher_first), [4] * num_batches)
    assert first.updates[0] == second.updates[2] == num_batches
    assert max(first.updates[1], second.updates[1]) == num_batches
    trained = [sorted(call for call in notes.calls if "train 1" in call) for notes in (first, second)]
    assert [len(calls) for calls in trained] == [num_batches // 2, -(-num_batches // 2)]
    assert "take over 1" in first.calls and "take over 1" in second.calls
    assert not any(one.mailbox.results for one in made)
    assert all(window.ended for one in made for window in one.windows.known.values()), "windows that are over are forgotten"
