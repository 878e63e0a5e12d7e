"""The cost model's terms by hand: seconds and bytes of a stage, data parallelism, whole blocks on ranks."""

import pytest
from plan.blockwise.tasks import line

from pipestill.costs import Link
from pipestill.errors import PlanError
from pipestill.plan.blockwise.cost_model import Problem, Stage, dp_seconds, ls, most_rows, stage_memory_bytes, stage_seconds
from pipestill.schedule.blockwise.profile import BlockProfile


def test_seconds_by_hand() -> None:
    profile = BlockProfile((line(1.0, 2.0), line(3.0, 5.0)), Link(0.5, 100.0))
    assert stage_seconds(profile, 0, 2, 1, 4) == 4 * (3 + 8)
    assert stage_seconds(profile, 1, 2, 1, 4) == 4 * 8 + (0.5 + 40 / 100)
    exchange = 2 / 2 * 100 / 100 + 2 * 0.5
    assert stage_seconds(profile, 1, 2, 2, 4, speed=2.0) == 2 * 8 / 2 + exchange + (0.5 + 20 / 100)
    assert dp_seconds(profile, 4, 2) == 2 * ((1 + 2) + (1 + 3 + 5)) + 2 * exchange
    assert dp_seconds(profile, 4, 2, speeds=[4.0, 2.0]) == 12 + 2 * exchange


def test_memory_by_hand() -> None:
    profile = BlockProfile((line(1, 1, held=1), line(1, 1, held=7), line(1, 1, held=2)), Link())
    assert stage_memory_bytes(profile, 0, 1, 5) == 11 + 5 * (10 + 30 + 1)  # the output is there, and two more wait
    assert stage_memory_bytes(profile, 0, 3, 5) == 11 * (1 + 7 + 2) + 5 * (30 + 10 + 7)
    assert stage_memory_bytes(profile, 2, 3, 5) == 22 + 5 * (10 + 10 + 10 + 2)  # two inputs: one is the next batch's


def test_ls_puts_the_longest_task_first() -> None:
    """Tasks of one row: 1 + 1, 2 + 4, 3 + 3, 4 + 8 seconds."""
    profile = BlockProfile((line(1.0, 1.0), line(1.0, 4.0), line(1.0, 3.0), line(1.0, 8.0)))
    found = ls(profile, 2, 2)
    assert (found.assignment, found.rank_seconds, found.seconds) == (((0, 3), (1, 2)), (28.0, 24.0), 28.0)
    assert ls(profile, 2, 2, speeds=[1.0, 3.0]).assignment == ((1,), (0, 2, 3))
    assert ls(profile, 2, 6).assignment == ((3,), (1,), (2,), (0,), (), ())


@pytest.mark.parametrize(("batch", "ranks", "rows"), [(6, 1, 6), (6, 3, 2), (7, 3, 3), (2, 5, 1)])
def test_most_rows_is_the_largest_share_of_a_batch(batch: int, ranks: int, rows: int) -> None:
    assert most_rows(batch, ranks) == rows


def test_a_problem_judges_stages_by_their_slowest_rank_and_fullest_memory() -> None:
    profile = BlockProfile((line(1.0, 2.0, held=1), line(3.0, 5.0, held=2)), Link())
    first, last = Stage(0, 1, (0,)), Stage(1, 2, (1, 2))
    problem = Problem(profile, 4, 3, [1.0, 4.0, 2.0], memory_bytes=100)
    assert problem.seconds_of(first) == stage_seconds(profile, 0, 1, 1, 4) == 12
    assert problem.seconds_of(last) == stage_seconds(profile, 1, 2, 2, 4, speed=2.0) == 8
    assert problem.bytes_of(last) == stage_memory_bytes(profile, 1, 2, 2)
    fits = [max(map(problem.bytes_of, stages)) <= 100 for stages in ([first], [first, last])]
    assert [problem.fits([first]), problem.fits([first, last])] == fits


def test_all_wrong_arguments_are_told_at_once() -> None:
    profile = BlockProfile((line(1, 1),))
    for strategy in (ls, dp_seconds):
        with pytest.raises(
            PlanError, match="batch of 0 rows; .*; 0 devices; expected .*; 2 speeds for 0 devices; .*; a speed of -1"
        ):
            strategy(profile, 0, 0, speeds=[1.0, -1.0])  # type: ignore[operator]
