"""Tags tell apart whatever can be under way at once between two ranks."""

from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from typing import Any

import pytest
from schedule.blockwise.tasks import half_a_block_moves
from support.targets import message

from pipestill.runtime.transport import message as messages
from pipestill.runtime.transport.message import Message, queue_of, tag
from pipestill.schedule import Action, Lane, Op, Role, Schedule, generate
from pipestill.schedule.blockwise.generate import staged
from pipestill.schedule.comms import edges
from pipestill.schedule.structure import crossings, lane


def test_eighth_validation_is_not_taken_for_training() -> None:
    """Training prefetches into the next step while a validation runs; the tags of segments 0 and 8 were the same."""
    training = {tag(message(f"S0F{m}@{step}"), 0) for m in range(8) for step in range(64)}
    for segment in range(1, 40):
        validation = {tag(message(f"S0F{m}@{step}", segment=segment), 0) for m in range(8) for step in range(64)}
        assert training.isdisjoint(validation)


def works(microbatches: int, steps: range) -> list[Action]:
    """Every work that may send its result, of one stage of each role."""
    found = []
    for role, op, step in product(Role, Op, steps):
        for microbatch in range(microbatches) if op.per_microbatch else (None,):
            with suppress(ValueError):  # a teacher has no loss, a student no average
                found.append(Action(role, 0, op, microbatch, step))
    return found


@pytest.mark.parametrize(("microbatches", "steps", "parts"), [(1023, range(63, 65), 1), (6, range(40, 40 + 64), 2)])
def test_every_lane_segment_work_and_part_has_a_tag_of_its_own(microbatches: int, steps: range, parts: int) -> None:
    """All that a tag tells apart: most microbatches in two steps, and most steps with a few microbatches."""
    segments = (0, 7) if microbatches > 6 else range(8)
    lanes = (Lane.DATA, Lane.TEACHER, Lane.REPORT) if microbatches > 6 else list(Lane)[:4]
    tags = [
        tag(Message(on, work, 0, 1, segment), part)
        for on, work, segment, part in product(lanes, works(microbatches, steps), segments, range(parts))
    ]
    assert len(set(tags)) == len(tags)
    assert min(tags) >= 0
    assert max(tags) < 2**31


def test_all_digits_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole product of lanes, segments, works and parts, where each counts to a few."""
    for name, few in {"_SEGMENTS": 3, "_STEPS": 4, "_MICROBATCHES": 4, "_PARTS": 2}.items():
        monkeypatch.setattr(messages, name, few)
    everything = product(Lane, works(3, range(8, 12)), range(3), range(2))
    tags = [tag(Message(on, work, 0, 1, segment), part) for on, work, segment, part in everything]
    assert len(set(tags)) == len(tags)


SCHEDULES: dict[str, Callable[[], Schedule[Any]]] = {
    "sequential": lambda: generate("sequential", 4, 16),
    "fill": lambda: generate("fill", 4, 16),
    "hybrid": lambda: staged("hybrid", [(range(2), (0, 1, 2)), (range(2, 5), (3, 4))]),
    "balanced": lambda: half_a_block_moves(teacher_first=True),
}


@pytest.mark.parametrize("strategy", SCHEDULES)
def test_messages_of_a_schedule_under_way_together(strategy: str) -> None:
    """Equal tags on one edge would need one lane, in whose order messages are matched: here there are none at all."""
    schedule = SCHEDULES[strategy]()
    structure = schedule.structure
    on_edge = defaultdict[tuple[int, int], list[int]](list)
    for work, source, destination in crossings(structure):
        lanes = {lane(work.receive_from(source), destination, structure)}
        if work.op is Op.DATA:
            lanes.update(filter(None, [structure.batch_lane(destination)]))
        for on, step in product(lanes, range(100, 103)):
            on_edge[source, destination].append(tag(Message(on, work.at(step), source, destination), 0))
    assert on_edge.keys() >= {(source, destination) for source, destination, _ in edges(structure)}
    assert all(len(set(tags)) == len(tags) for tags in on_edge.values())


def test_queues_are_of_a_segment_and_beside_the_schedule_or_not() -> None:
    assert queue_of(message("S0F1@2")) == (0, False)
    assert queue_of(message("S0F1@2", Lane.TARGET, segment=3)) == (3, True)


def test_messages_say_what_they_carry() -> None:
    assert str(message("S0F1@2")) == "S0F1@2 from rank 0 on the activation lane"
    assert str(message("T1F0@3", Lane.TEACHER, segment=2)) == "T1F0@3 of validation or phase 2 from rank 0 on the teacher lane"
