"""Figures of a trace, on traces written by hand."""

import pytest

from pipestill.costs import StageCosts
from pipestill.schedule import Action, Event, Trace, generate
from pipestill.schedule.simulate import simulate


def trace(num_ranks: int, *events: tuple[int, str, float, float]) -> Trace:
    return Trace(num_ranks, tuple(Event(rank, Action.parse(text), start, end) for rank, text, start, end in events))


def steps_ending(*ends: float) -> Trace:
    """One rank whose steps end at these times, each with one second of work before."""
    events = [(0, f"S0F0@{k}", end - 1.0, end) for k, end in enumerate(ends)]
    return trace(1, *events, *((0, f"S0U@{k}", end, end) for k, end in enumerate(ends)))


def test_empty() -> None:
    empty = trace(2)
    assert empty.steps() == []
    assert empty.step_seconds() == []
    assert empty.seconds_per_step == empty.median_seconds_per_step == empty.utilisation == 0.0
    assert empty.bubble == 1.0
    assert empty.busy_seconds_per_step() == [0.0, 0.0]
    assert empty.stash_peak == (0, 0)
    assert empty.steady_window() == (0.0, 0.0)


def test_one_step_has_no_steady_state() -> None:
    one = steps_ending(3.0)
    assert one.steps() == [0]
    assert one.seconds_per_step == 0.0
    assert one.steady_window() == (2.0, 3.0)


def test_two_steps() -> None:
    two = steps_ending(3.0, 7.0)
    assert two.step_seconds() == [4.0]
    assert two.seconds_per_step == 4.0
    assert two.utilisation == 0.25
    assert two.steady_window() == (3.0, 7.0)


def test_steady_state_is_the_middle_third() -> None:
    """Steps 0 to 9 lie 9 intervals apart: the first three and the last three are left out."""
    long = steps_ending(100, 200, 300, 400, 402, 405, 409, 500, 600, 700)
    assert long.step_seconds() == [2, 3, 4]
    assert long.seconds_per_step == 3
    assert long.median_seconds_per_step == 3
    assert long.utilisation == pytest.approx(1 / 3)
    assert long.bubble == pytest.approx(2 / 3)
    assert long.steady_window() == (400, 405)
    assert long.steady_window(num_steps=99) == (400, 409)


def test_median_is_not_moved_by_one_slow_step() -> None:
    long = steps_ending(0, 10, 20, 30, 40, 1050, 1060, 1070, 1080, 1090)
    assert long.step_seconds() == [10, 1010, 10]
    assert long.median_seconds_per_step == 10
    assert long.seconds_per_step == pytest.approx(1030 / 3)


def test_a_step_is_over_when_its_last_rank_has_updated() -> None:
    two_ranks = trace(2, (0, "S0U@0", 4.0, 5.0), (1, "S1U@0", 1.0, 2.0), (0, "S0U@1", 8.0, 9.0), (1, "S1U@1", 9.0, 11.0))
    assert two_ranks.step_seconds() == [6.0]


def test_a_step_that_not_all_ranks_have_ended_does_not_count() -> None:
    """A run that was stopped: its last step is cut off."""
    whole = [(0, "S0U@0", 0.0, 1.0), (1, "S1U@0", 0.0, 2.0), (0, "S0U@1", 3.0, 4.0), (1, "S1U@1", 3.0, 5.0)]
    cut = trace(2, *whole, (0, "S0U@2", 6.0, 7.0))
    assert cut.steps() == [0, 1]
    assert cut.seconds_per_step == 3.0


def test_busy_seconds_are_of_the_step_that_the_work_is_for() -> None:
    """A teacher forward for step 1 that ran during step 0 is work of step 1."""
    ahead = trace(
        2,
        (0, "T0F0@1", 0.0, 1.5),
        (0, "S0U@0", 2.0, 3.0),
        (1, "S1U@0", 2.0, 3.0),
        (0, "S0U@1", 4.0, 5.0),
        (1, "S1U@1", 4.5, 5.0),
        (0, "T0F0@2", 5.0, 6.0),
    )
    assert ahead.busy_seconds_per_step() == [2.5, 0.5]
    assert ahead.utilisation == pytest.approx(3.0 / (2 * 2.0))


def test_utilisation_is_at_most_one() -> None:
    """Clocks of several processes can make the work of a step look longer than the step."""
    assert trace(1, (0, "S0U@0", 0.0, 1.0), (0, "S0U@1", 0.5, 2.0)).utilisation == 1.0


def test_stash_counts_from_forward_to_backward() -> None:
    rank0 = ["S0F0@0", "T0F0@1", "S0F1@0", "S0B0@0", "S0F2@0", "S0B1@0", "S0B2@0", "S0U@0"]
    rank1 = ["S1F0@0", "S1L0@0", "S1B0@0", "S1F1@0", "S1L1@0", "S1B1@0"]
    events = [(0, text, float(i), float(i)) for i, text in enumerate(rank0)]
    assert trace(2, *events, *((1, text, 0.0, 0.0) for text in rank1)).stash_peak == (2, 1)


def test_predicted_memory_is_the_declared_one() -> None:
    for strategy in ("sequential", "gpipe", "1f1b", "fill"):
        schedule = generate(strategy, 3, 4)
        assert simulate(schedule, StageCosts(*[(1.0,) * 3] * 4)).stash_peak == schedule.stash


def test_seconds_of_an_event() -> None:
    assert Event(0, Action.parse("S0U@0"), 1.0, 3.5).seconds == 2.5
