"""List scheduling, on cases small enough to do by hand: work takes one second, whole backwards two."""

from dataclasses import replace
from typing import Any

import pytest
from schedule.tasks import texts_of, uniform

from pipestill.costs import Link
from pipestill.schedule import check
from pipestill.schedule.comms import connect
from pipestill.schedule.pipeline.greedy import Greedy
from pipestill.schedule.pipeline.structure import pipeline
from pipestill.schedule.simulate import simulate


def rows(n: int, m: int, stash: int, run_ahead: int = 99, lead: int = 0, first: bool = True, **work: Any) -> list[str]:
    structure = pipeline(n, m, **work)
    costs = uniform(n, 1, 1, 2, weight=1)
    found = Greedy(structure, costs, (stash,) * n, run_ahead, lead, first).rows()
    assert found is not None
    check(connect("greedy", structure, found, (stash,) * n, run_ahead))
    return texts_of(found)


def test_momentum_teacher_on_one_rank() -> None:
    """The teacher of the next batch waits for its own update, which waits for the student's."""
    assert rows(1, 1, stash=1, momentum=True) == ["T0F0@0 S0F0@0 S0L0@0 S0B0@0 S0U@0 T0E@0"]


def test_stale_teacher_is_a_batch_ahead() -> None:
    """And moves as soon as it has run it: before the student's next step begins."""
    assert rows(1, 1, stash=1, momentum=True, staleness=1) == ["S0F0@0 S0L0@0 S0B0@0 S0U@0 T0F0@1 T0E@0"]


def test_norm_stands_right_before_its_update() -> None:
    assert rows(1, 1, stash=1, momentum=True, clip=True) == ["T0F0@0 S0F0@0 S0L0@0 S0B0@0 S0N@0 S0U@0 T0E@0"]


def test_clipping_over_several_ranks_settles() -> None:
    """Symptom: every update waited for norms that others only had with their own update, so nothing was ever found."""
    first, last = rows(2, 2, stash=2, momentum=True, clip=True)
    assert first.split()[-3:] == ["S0N@0", "S0U@0", "T0E@0"] and last.split()[-3:] == ["S1N@0", "S1U@0", "T1E@0"]


def test_gradients_of_weights_wait_for_a_bubble() -> None:
    """There is none on one rank, so they come where nothing else is left to do."""
    assert rows(1, 2, stash=2, teacher=False, split=True) == ["S0F0@0 S0L0@0 S0I0@0 S0F1@0 S0L1@0 S0I1@0 S0W0@0 S0W1@0 S0U@0"]


def test_full_stash_forces_a_gradient_of_weights() -> None:
    assert rows(1, 2, stash=1, teacher=False, split=True) == ["S0F0@0 S0L0@0 S0I0@0 S0W0@0 S0F1@0 S0L1@0 S0I1@0 S0W1@0 S0U@0"]


def test_last_stage_puts_off_what_the_first_does_not_wait_for() -> None:
    """Rank 1 is at T1 F0 I0 when rank 0 idles; rank 0 fills that with W0."""
    assert rows(2, 2, stash=2, momentum=True, split=True) == [
        "T0F0@0 S0F0@0 T0F1@0 S0F1@0 S0I0@0 S0W0@0 S0I1@0 S0W1@0 S0U@0 T0E@0",
        "T1F0@0 S1F0@0 S1L0@0 S1I0@0 T1F1@0 S1F1@0 S1L1@0 S1I1@0 S1W0@0 S1W1@0 S1U@0 T1E@0",
    ]


def test_run_ahead_bounds_the_teacher() -> None:
    """With none at all, each teacher forward comes after the student's of its microbatch."""
    assert rows(1, 2, stash=1, run_ahead=0, momentum=True) == [
        "S0F0@0 T0F0@0 S0L0@0 S0B0@0 S0F1@0 T0F1@0 S0L1@0 S0B1@0 S0U@0 T0E@0"
    ]


def test_lead_lets_the_teacher_go_before_the_student() -> None:
    """One unit further ahead than it has to be, before every forward."""
    assert rows(1, 2, stash=1, lead=0, momentum=True) == ["T0F0@0 S0F0@0 S0L0@0 S0B0@0 T0F1@0 S0F1@0 S0L1@0 S0B1@0 S0U@0 T0E@0"]
    assert rows(1, 2, stash=1, lead=1, momentum=True) == ["T0F0@0 T0F1@0 S0F0@0 S0L0@0 S0B0@0 S0F1@0 S0L1@0 S0B1@0 S0U@0 T0E@0"]


def test_order_does_not_depend_on_the_unit_of_time() -> None:
    structure = pipeline(3, 5, momentum=True, split=True)
    costs = uniform(3, 1, 1, 2, weight=1)
    tiny = uniform(3, 2**-20, 2**-20, 2**-19, weight=2**-20)
    assert Greedy(structure, costs, (5,) * 3, 9).rows() == Greedy(structure, tiny, (5,) * 3, 9).rows()


def test_slow_links_are_waited_for() -> None:
    """Rows are in an order that suits the link: with a latency, rank 0 has more to do while rank 1 answers."""
    structure = pipeline(2, 3, momentum=True, split=True)
    costs = replace(uniform(2, 1, 1, 2, weight=1), link=Link(latency_seconds=1.0))
    found = Greedy(structure, costs, (3, 3), 9).rows()
    assert found is not None
    schedule = connect("greedy", structure, found, (3, 3), 9)
    check(schedule)
    seconds = simulate(schedule, costs).seconds_per_step
    near = Greedy(structure, uniform(2, 1, 1, 2, weight=1), (3, 3), 9).rows()
    assert near is not None
    assert seconds <= simulate(connect("greedy", structure, near, (3, 3), 9), costs).seconds_per_step


@pytest.mark.parametrize("stash", [0, 1])
def test_no_rows_where_the_first_step_gets_stuck(stash: int) -> None:
    """A loss over two microbatches that cannot both be held."""
    structure = pipeline(1, 2, batch_loss=True)
    assert Greedy(structure, uniform(1, 1, 1, 2), (stash,), 9).rows() is None
