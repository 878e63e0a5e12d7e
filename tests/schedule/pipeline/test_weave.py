"""Rows that are woven for a period, and the bounds that they keep."""

from typing import Any

import pytest
from schedule.tasks import lists_of, uniform

from pipestill.schedule import check
from pipestill.schedule.comms import connect
from pipestill.schedule.pipeline.candidates import Candidates
from pipestill.schedule.pipeline.structure import pipeline
from pipestill.schedule.pipeline.weave import in_order, stash_bounds, teacher_bounds, weave
from pipestill.schedule.pipeline.work import Rows, most_ahead
from pipestill.schedule.simulate import simulate

(WEIGHTS,) = lists_of("S0W0@0 S0W1@0")


def test_in_order() -> None:
    """One after the other, and the first of the next step after the last of this."""
    first, second = WEIGHTS
    assert in_order(WEIGHTS) == [(first, second, 0), (second, first, 1)]
    assert in_order([first]) == [(first, first, 1)]


def test_stash_bounds() -> None:
    """The third forward waits for the end of the first backward, with room for two."""

    def bounds(**work: Any) -> list[tuple[str, str, int]]:
        edges = stash_bounds(pipeline(2, 4, teacher=False, **work), stage=1, stash=2)
        return [(str(first), str(second), steps) for first, second, steps in edges]

    assert bounds(split=True) == [("S1W0@0", "S1F2@0", 0), ("S1W1@0", "S1F3@0", 0)]
    assert bounds() == [("S1B0@0", "S1F2@0", 0), ("S1B1@0", "S1F3@0", 0)]


def test_teacher_bounds() -> None:
    """The teacher waits for the update of the step before, and no more than one unit ahead for the student's forwards."""

    def bounds(run_ahead: int | None, **work: Any) -> list[tuple[str, str, int]]:
        edges = teacher_bounds(pipeline(1, 2, momentum=True, **work), 0, run_ahead)
        return [(str(first), str(second), steps) for first, second, steps in edges]

    assert bounds(None) == [("S0U@0", "T0F0@0", 1), ("S0U@0", "T0F1@0", 1)]
    assert bounds(None, staleness=1) == [("S0U@0", "T0F0@0", 2), ("S0U@0", "T0F1@0", 2)]
    assert bounds(1) == [
        ("S0U@0", "T0F0@0", 1), ("S0F1@0", "T0F0@0", 1), ("S0U@0", "T0F1@0", 1), ("S0F0@0", "T0F1@0", 0),
    ]  # fmt: skip
    assert ("S0F1@0", "T0F1@0", 1) in bounds(2), "two units ahead, it waits for the last forward of the step before"


def woven(period: float, run_ahead: int | None = None, **work: Any) -> tuple[Rows | None, Candidates]:
    structure = pipeline(2, 3, **work)
    costs = uniform(2, 1, 1, 2, weight=1)
    made = Candidates(structure, costs, 3, run_ahead)
    return weave(made, period, latest=structure.momentum), made


@pytest.mark.parametrize(
    "work",
    [
        {},
        {"split": True},
        {"momentum": True, "split": True},
        {"momentum": True, "staleness": 1},
        {"teacher": False, "split": True},
    ],
)
def test_woven_rows_are_valid_and_keep_the_period(work: dict[str, Any]) -> None:
    for period in (12.0, 13.0, 16.0):
        rows, made = woven(period, **work)
        if rows is not None:
            break
    assert rows is not None
    schedule = connect("woven", made.structure, rows, made.stash, most_ahead(rows, made.structure))
    check(schedule)
    assert simulate(schedule, made.costs).seconds_per_step <= period * (1 + 1e-9)


def test_nothing_is_woven_into_a_period_that_is_too_short() -> None:
    """A rank has 12 s of work."""
    assert woven(11.9)[0] is None
    assert woven(11.9, momentum=True, staleness=1, split=True)[0] is None


def test_run_ahead_is_kept() -> None:
    rows, made = woven(20.0, run_ahead=2, momentum=True)
    assert rows is not None
    assert most_ahead(rows, made.structure) <= 2
