"""Schedules as rows."""

from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st
from schedule.tasks import Task, tasks

from pipestill.schedule import Action, Op, Schedule, generate
from pipestill.schedule.pipeline.sequential import forward_only

pytestmark = pytest.mark.usefixtures("_short_search")


def schedules() -> st.SearchStrategy[Schedule]:
    training = tasks(most_stages=3, most_units=4).map(Task.schedule)
    return training | st.builds(forward_only, st.integers(1, 4), st.integers(1, 5))


def test_unrolled_rows_leave_out_steps_before_the_first_and_after_the_last() -> None:
    schedule = generate("fill", 1, 1)
    (row,) = schedule.rows
    written = [str(a) for a in row]
    assert written == ["S0D@1", "T0F0@0", "S0F0@0", "S0L0@0", "S0B0@0", "S0U@0"]
    ahead = replace(schedule, rows=(tuple(map(Action.parse, ["S0D@2", "S0F0@0", "T0F0@1", *written[3:]])),))
    assert ahead.lookahead == 2
    assert [" ".join(map(str, r)) for r in ahead.unroll(2)] == [
        "S0D@0 S0D@1 T0F0@0 S0F0@0 T0F0@1 S0L0@0 S0B0@0 S0U@0 S0F0@1 S0L0@1 S0B0@1 S0U@1"
    ]


@given(schedules(), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_unrolled_rows_hold_every_work_of_every_step(schedule: Schedule, num_steps: int) -> None:
    done = [a for row in schedule.unroll(num_steps) for a in row if a.computes]
    assert len(done) == len(set(done))
    assert set(done) == {a for step in range(num_steps) for a in schedule.structure.actions(step)}


def test_a_run_of_no_steps_is_empty() -> None:
    assert generate("1f1b", 2, 2).unroll(0) == [[], []]


def test_one_row_and_one_bound_a_rank() -> None:
    schedule = generate("1f1b", 2, 2)
    with pytest.raises(ValueError, match="1 rows and 2 stash bounds for 2 ranks"):
        replace(schedule, rows=schedule.rows[:1])
    with pytest.raises(ValueError, match="2 rows and 3 stash bounds for 2 ranks"):
        replace(schedule, stash=(1, 1, 1))


def test_work_of_a_step_before_its_period_is_refused() -> None:
    """Unrolling would leave out such work of the last step without a word."""
    schedule = generate("1f1b", 1, 1)
    row = tuple(a.at(-1) if a.op is Op.UPDATE else a for a in schedule.rows[0])
    with pytest.raises(ValueError, match=r"count from 0, its oldest step; got S0U@-1"):
        replace(schedule, rows=(row,))
