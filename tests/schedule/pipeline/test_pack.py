"""A frozen teacher's forwards in the student's gaps, and which of its forwards each is."""

import pytest
from schedule.tasks import lists_of, texts_of, uniform

from pipestill.costs import StageCosts
from pipestill.schedule import Action, check
from pipestill.schedule.comms import connect
from pipestill.schedule.pipeline.one_f_one_b import one_f_one_b
from pipestill.schedule.pipeline.pack import POLICIES, Window, idle_windows, labelled, packed
from pipestill.schedule.pipeline.structure import pipeline
from pipestill.schedule.pipeline.work import Timed
from pipestill.schedule.simulate import simulate

FROZEN = pipeline(2, 2)


def windows(costs: StageCosts) -> list[Window]:
    return idle_windows(simulate(one_f_one_b(2, 2, teacher=False), costs), costs, FROZEN)


def test_gaps_are_where_the_student_idles() -> None:
    """F0 F1 .. B0 B0 B1 B1 on rank 0 (with B of 2 s, rank 1's F0 B0 takes 3 s); rank 1 waits for the first forward."""
    first, last = windows(uniform(2, 1, 1, 2))
    assert first.period == last.period == 9.0
    assert [str(timed.action) for timed in first.work] == ["S0F0@0", "S0F1@0", "S0B0@0", "S0B1@0", "S0U@0"]
    assert [seconds for _, seconds in first.gaps] == [2.0, 1.0]
    assert [seconds for _, seconds in last.gaps] == [3.0]


def test_a_period_is_as_long_as_the_loads() -> None:
    """A teacher of 6 s a forward makes a rank's work 2 (6 + 1 + 2) s, and the student's gaps that much longer."""
    for window in windows(uniform(2, 6, 1, 2)):
        assert window.period == 18.0
        assert sum(seconds for _, seconds in window.gaps) == 12.0


@pytest.mark.parametrize("policy", POLICIES)
def test_packed_rows_are_valid(policy: str) -> None:
    costs = uniform(2, 1, 1, 2)
    rows = packed(windows(costs), FROZEN, costs, policy)
    assert rows is not None
    schedule = connect("packed", FROZEN, rows, (2, 1), 9)
    check(schedule)
    assert simulate(schedule, costs).seconds_per_step == 9.0, "the gaps hold all of it"


def rows_of(*texts: str) -> list[list[Timed]]:
    """`.` is a forward of the teacher; each action starts one second after the one before."""
    return [
        [Timed(float(i), None if word == "." else Action.parse(word)) for i, word in enumerate(text.split())] for text in texts
    ]


def test_forwards_are_of_the_step_whose_loss_they_are_in_time_for() -> None:
    """On the last rank, the slot before the loss of unit 0 can be that unit itself; the one behind is of the step after."""
    rows = rows_of("S0F0@0 . S0L0@0 S0B0@0 S0F1@0 S0L1@0 . S0B1@0 S0U@0")
    made = labelled(rows, pipeline(1, 2), StageCosts((0.5,), (0.5,), (0.0,), (0.5,)), 9.0)
    assert made is not None
    (row,) = texts_of(made)
    assert row == "S0F0@0 T0F1@0 S0L0@0 S0B0@0 S0F1@0 S0L1@0 T0F0@1 S0B1@0 S0U@0"


def test_ranks_before_are_further_ahead() -> None:
    rows = rows_of(". S0F0@0 S0B0@0 S0U@0", "S1F0@0 . S1L0@0 S1B0@0 S1U@0")
    made = labelled(rows, pipeline(2, 1), StageCosts(*[(1.0, 1.0)] * 4), 5.0)
    assert made is not None
    assert texts_of(made) == ["T0F0@0 S0F0@0 S0B0@0 S0U@0", "S1F0@0 T1F0@0 S1L0@0 S1B0@0 S1U@0"]
    late = labelled(
        rows_of("S0F0@0 . S0B0@0 S0U@0", "S1F0@0 . S1L0@0 S1B0@0 S1U@0"), pipeline(2, 1), StageCosts(*[(1.0, 1.0)] * 4), 5.0
    )
    assert late is not None
    assert texts_of(late)[0] == "S0F0@0 T0F0@1 S0B0@0 S0U@0", "it would come too late for this step"


def test_no_rows_where_a_teacher_would_be_too_far_ahead() -> None:
    rows = rows_of(". S0F0@0 S0B0@0 S0U@0", "S1F0@0 . S1L0@0 S1B0@0 S1U@0")
    slow = StageCosts((1.0, 1.0), (1.0, 1.0), (0.0, 0.0), (1000.0, 1000.0))
    assert labelled(rows, pipeline(2, 1), slow, 5.0) is None


def test_a_period_ends_with_its_update() -> None:
    """What a rank does behind the last backward goes to the front of the next period, one step less ahead."""
    rows = rows_of("S0F0@0 S0L0@0 S0B0@0 . S0U@0")
    made = labelled(rows, pipeline(1, 1), StageCosts((0.5,), (0.5,), (0.0,), (0.5,)), 5.0)
    assert made == lists_of("T0F0@0 S0F0@0 S0L0@0 S0B0@0 S0U@0")
