"""Rows that fill times: the teacher first, inside, packed, and by list scheduling."""

from typing import Any

import pytest
from schedule.tasks import texts_of, uniform

from pipestill.schedule import Op, Role, check
from pipestill.schedule.comms import connect
from pipestill.schedule.pipeline.candidates import Candidates
from pipestill.schedule.pipeline.structure import pipeline
from pipestill.schedule.pipeline.work import Rows, most_ahead


def candidates(n: int = 2, m: int = 2, stash: int = 2, run_ahead: int | None = None, **work: Any) -> Candidates:
    structure = pipeline(n, m, **work)
    return Candidates(structure, uniform(n, 1, 1, 2, weight=1, views=structure.views), stash, run_ahead)


def test_plain_rows_run_the_teacher_first() -> None:
    assert texts_of(candidates().plain()) == [
        "T0F0@0 T0F1@0 S0F0@0 S0F1@0 S0B0@0 S0B1@0 S0U@0",
        "T1F0@0 T1F1@0 S1F0@0 S1L0@0 S1B0@0 S1F1@0 S1L1@0 S1B1@0 S1U@0",
    ]


def test_gradients_of_weights_follow_those_of_inputs() -> None:
    (row,) = texts_of(candidates(1, 1, 1, teacher=False, split=True).plain())
    assert row == "S0F0@0 S0L0@0 S0I0@0 S0W0@0 S0U@0"


@pytest.mark.parametrize(
    ("ahead", "momentum", "forwards"),
    [
        (0, False, "T0F0@0 S0F0@0 T0F1@0 S0F1@0"),
        (1, False, "T0F1@0 S0F0@0 T0F0@1 S0F1@0"),
        (1, True, "T0F1@0 S0F0@0 S0F1@0 T0F0@1"),  # the one of the next step stands behind the update
    ],
)
def test_teacher_forwards_stand_before_forwards_of_the_student(ahead: int, momentum: bool, forwards: str) -> None:
    (row,) = candidates(1, 2, 2, momentum=momentum)._inside(ahead)
    assert " ".join(str(action) for action in row if action.op is Op.FORWARD) == forwards
    if momentum:
        assert str(row[-1]) == "T0F0@1" and Op.EMA in [action.op for action in row[:-1]]


def test_the_teacher_goes_along_with_views_that_it_sees() -> None:
    (made,) = candidates(1, 2, 2, views=2, teacher_views=1)._inside(0)
    assert " ".join(str(a) for a in made if a.op is Op.FORWARD) == "T0F0@0 S0F0@0 S0F1@0 T0F1@0 S0F2@0 S0F3@0"


def test_actions_are_counted_with_all_that_is_flexible() -> None:
    made = candidates(2, 3, 2, split=True, momentum=True)
    assert made.num_actions == sum(map(len, made.plain()))
    alone = candidates(2, 3, 2, teacher=False)
    assert alone.num_actions == sum(map(len, alone.plain()))


def valid(rows: Rows, made: Candidates) -> bool:
    ahead = most_ahead(rows, made.structure)
    check(connect("candidate", made.structure, rows, made.stash, ahead))
    return made.run_ahead is None or ahead <= made.run_ahead


def test_all_that_keep_to_their_bounds_are_valid() -> None:
    made = candidates(2, 3, 2)
    assert all(valid(rows, made) for rows in made.all(few=False))


def test_few_are_fewer_where_each_takes_long() -> None:
    made = candidates(2, 2, 2, momentum=True, split=True)
    assert len(list(made.all(few=True))) < len(list(made.all(few=False)))


def test_a_stale_teacher_has_no_plain_rows() -> None:
    """Its forwards are of the batch after, so that a teacher that runs first would be too fresh."""
    made = candidates(2, 2, 2, momentum=True, staleness=1)
    assert made.plain() not in list(made.all(few=False))


def test_the_student_alone_is_timed_without_its_teacher() -> None:
    trace = candidates(2, 2, 2, momentum=True, split=True).student_alone
    assert {event.action.role for event in trace.events} == {Role.STUDENT}
    assert trace.seconds_per_step == 9.0
