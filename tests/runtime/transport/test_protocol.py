"""Tags tell apart whatever can be under way at once between two ranks."""

from __future__ import annotations

from pipestill.runtime.transport.protocol import Message, tag
from pipestill.schedule import Action, Lane


def message(text: str, segment: int, lane: Lane = Lane.ACTIVATION) -> Message:
    return Message(lane, Action.parse(text), 0, 1, segment)


def test_eighth_validation_is_not_taken_for_training() -> None:
    """Training prefetches into the next step while a validation runs; the tags of segments 0 and 8 were the same."""
    training = {tag(message(f"S0F{m}@{step}", 0), 0) for m in range(8) for step in range(64)}
    for segment in range(1, 40):
        assert training.isdisjoint(tag(message(f"S0F{m}@{step}", segment), 0) for m in range(8) for step in range(64))


def test_messages_under_way_together_have_tags_of_their_own() -> None:
    texts = [f"{role}0F{m}@{step}" for role in "ST" for m in range(16) for step in range(100, 110)]
    texts += [f"S1B{m}@{step}" for m in range(16) for step in range(100, 110)]
    tags = [
        tag(message(text, segment, lane), part)
        for text in texts
        for lane in Lane
        for segment in (0, 5, 6)
        for part in range(3)
    ]
    assert len(set(tags)) == len(tags)
    assert max(tags) < 2**31
