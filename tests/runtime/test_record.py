"""What a recorder keeps, by a clock of the test's own."""

from itertools import count

import pytest
import torch

from pipestill.runtime import record
from pipestill.runtime.record import Recorder
from pipestill.schedule import Action


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Every look at the clock is a second after the one before."""
    ticks = count()
    monkeypatch.setattr(record.time, "perf_counter", lambda: float(next(ticks)))
    return Recorder(3, torch.device("cpu"), num_steps=2)


def work(recorder: Recorder, text: str) -> None:
    with recorder.working(Action.parse(text)):
        pass


def test_events_are_in_the_order_in_which_they_started(recorder: Recorder) -> None:
    for text in ("S0F0@0", "S0F0@1", "S0B0@0"):
        work(recorder, text)
    events = recorder.events()
    assert [str(event.action) for event in events] == ["S0F0@0", "S0F0@1", "S0B0@0"]
    assert all(event.rank == 3 and event.end - event.start == 1.0 for event in events)
    assert recorder.busy_seconds == 3.0


def test_only_the_last_steps_are_kept(recorder: Recorder) -> None:
    for step in range(5):
        work(recorder, f"S0F0@{step}")
        recorder.interrupted_after(step)
    assert {event.action.step for event in recorder.events()} == {3, 4}
    assert recorder.interruptions() == {3, 4}
    assert recorder.busy_seconds == 5.0  # of the whole run


def test_work_that_fails_is_no_event(recorder: Recorder) -> None:
    with pytest.raises(ZeroDivisionError), recorder.working(Action.parse("S0F0@0")):
        raise ZeroDivisionError
    assert not recorder.events()
