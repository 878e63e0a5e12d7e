"""The clock agrees with the simulator, and says where rows get stuck."""

from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st
from schedule.pipeline.tables import rows_of_task
from schedule.tasks import Task, lists_of, stage_costs, tasks, uniform

from pipestill.costs import Link
from pipestill.schedule.comms import connect
from pipestill.schedule.pipeline.clock import Clock
from pipestill.schedule.pipeline.structure import pipeline
from pipestill.schedule.simulate import simulate

COSTS = uniform(2, 1, 1, 2)


@given(st.data(), tasks(["gpipe", "1f1b", "tspipe"], most_units=6))
@settings(max_examples=8, deadline=None)
def test_clock_agrees_with_the_simulator(data: st.DataObject, task: Task) -> None:
    """Where ranks do not disturb each other and links have room for all."""
    costs = replace(data.draw(stage_costs(task.num_stages, task.asked["views"])), link=Link(latency_seconds=0.5))
    rows, structure = rows_of_task(task, costs)
    simulated = simulate(connect("clocked", structure, rows, (99,) * len(rows), 999), costs, num_steps=30)
    assert Clock(structure, costs).period(rows) == pytest.approx(simulated.seconds_per_step, rel=1e-6)


def test_clock_of_rows_that_get_stuck() -> None:
    rows = lists_of("S0B0@0 S0F0@0 S0U@0", "S1F0@0 S1L0@0 S1B0@0 S1U@0")
    assert Clock(pipeline(2, 1, teacher=False), COSTS).period(rows) is None


def test_a_late_period_is_timed_and_not_the_first() -> None:
    """Rank 1 starts one second late, and then both repeat every 6 seconds: 1 + 2 on each rank, in turn."""
    rows = lists_of("S0F0@0 S0B0@0 S0U@0", "S1F0@0 S1L0@0 S1B0@0 S1U@0")
    assert Clock(pipeline(2, 1, teacher=False), COSTS).period(rows) == pytest.approx(6.0)


def test_transfers_and_interference_count() -> None:
    """Two hops of half a second a step; all work takes twice as long."""
    rows = lists_of("S0F0@0 S0B0@0 S0U@0", "S1F0@0 S1L0@0 S1B0@0 S1U@0")
    costs = replace(COSTS, link=Link(latency_seconds=0.5), interference=2.0)
    assert Clock(pipeline(2, 1, teacher=False), costs).period(rows) == pytest.approx(2 * 6.0 + 2 * 0.5)
