"""Schedules in the order of a plain loop."""

import pytest
from hypothesis import given, settings, strategies as st
from schedule.pipeline.tables import work

from pipestill.costs import StageCosts
from pipestill.schedule import check, generate
from pipestill.schedule.pipeline.sequential import forward_only
from pipestill.schedule.simulate import simulate


@given(st.integers(1, 5), st.integers(1, 6), st.lists(st.floats(0.1, 10.0), min_size=15, max_size=15))
@settings(max_examples=10, deadline=None)
def test_sequential_keeps_one_device_busy(n: int, m: int, s: list[float]) -> None:
    """However unequal the stages are, whether the teacher moves or not, in one view or two."""
    costs = StageCosts(tuple(s[:n]), tuple(s[5 : 5 + n]), (0.0,) * n, tuple(s[10 : 10 + n]), views=(1.0, 0.5))
    trace = simulate(generate("sequential", n, m), costs)
    assert trace.utilisation == pytest.approx(1 / n, rel=1e-9)
    assert trace.seconds_per_step == pytest.approx(m * sum(costs.forward + costs.backward + costs.teacher), rel=1e-9)
    trace = simulate(generate("sequential", n, m, momentum=True, views=2, batch_loss=True, clip=True), costs)
    assert trace.utilisation == pytest.approx(1 / n, rel=1e-9)
    step = m * (1.5 * sum(costs.forward + costs.backward) + sum(costs.teacher))
    assert trace.seconds_per_step == pytest.approx(step, rel=1e-9)


def test_forward_only() -> None:
    schedule = forward_only(3, 2)
    check(schedule)
    assert [work(row) for row in schedule.rows] == [["F0", "F1"]] * 3
    assert schedule.stash == (0, 0, 0)
