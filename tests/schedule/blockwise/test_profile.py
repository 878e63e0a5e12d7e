"""Times of blocks between measured points, the terms of the cost model, and files of them."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from schedule.blockwise.tasks import block_times

from pipestill.costs import Link
from pipestill.errors import ConfigError, PlanError
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes

SMALL = BlockTimes("conv", (4, 8, 16), (2.0, 3.0, 7.0), (5.0, 5.0, 4.0), 100, 1000)


# ---------------------------------------------------------------- seconds


@pytest.mark.parametrize(
    ("rows", "teacher", "student"),
    [
        (0, 0.0, 0.0),
        (2, 1.5, 5.0),  # the line through 4 and 8 goes on: what a launch costs, costs few rows too
        (4, 2.0, 5.0),
        (6.5, 2.625, 5.0),
        (12, 5.0, 4.5),
        (16, 7.0, 4.0),
        (32, 15.0, 2.0),
        (64, 31.0, 0.0),  # never below
    ],
)
def test_times_lie_on_lines_between_measured_points(rows: float, teacher: float, student: float) -> None:
    assert (SMALL.teacher(rows), SMALL.student(rows)) == (teacher, student)


def test_one_point_is_proportional() -> None:
    block = BlockTimes("conv", (8,), (2.0,), (4.0,), 0, 0)
    assert [block.teacher(rows) for rows in (0, 2, 8, 24)] == [0.0, 0.5, 2.0, 6.0]
    assert block.student(4) == 2.0


@given(block_times())
def test_measured_points_are_met_exactly(block: BlockTimes) -> None:
    assert tuple(map(block.teacher, block.rows)) == block.teacher_seconds
    assert tuple(map(block.student, block.rows)) == block.student_seconds


def test_allreduce_and_relay_by_hand() -> None:
    profile = BlockProfile((SMALL, SMALL), Link(latency_seconds=0.5, bytes_per_second=50.0))
    assert profile.allreduce_seconds(0, 1) == 0.0
    assert profile.allreduce_seconds(0, 2) == 2 / 2 * 1000 / 50 + 2 * 0.5
    assert profile.allreduce_seconds(1, 4) == 2 * 3 / 4 * 1000 / 50 + 6 * 0.5
    assert profile.relay_seconds(1, 32, 1) == 0.5 + 3200 / 50
    assert profile.relay_seconds(1, 10, 4) == 0.5 + 250 / 50
    free = BlockProfile(profile.blocks, Link())
    assert free.relay_seconds(1, 32, 1) == free.allreduce_seconds(1, 4) == 0.0


def test_measured_allreduces_replace_those_of_the_links() -> None:
    """Between measured sizes a straight line; above the largest, as many messages as a ring has."""
    profile = BlockProfile((SMALL, SMALL), Link(0.5, 50.0)).with_allreduces((2, 4), [(3.0, 7.0), (0.0, 0.0)])
    assert [profile.allreduce_seconds(0, k) for k in (1, 2, 3, 4, 7)] == [0.0, 3.0, 5.0, 7.0, 14.0]
    assert profile.allreduce_seconds(1, 5) == 0.0
    assert profile.scaled(2.0).allreduce_seconds(0, 2) == 3.0, "of work only"
    everything = profile.scaled(2.0, transfers=True)
    assert everything.allreduce_seconds(0, 2) == 6.0
    assert everything.link == Link(1.0, 25.0)


def test_scaled_work_leaves_what_messages_cost_a_rank() -> None:
    """Predictions of a scaled profile took messages to cost ranks nothing."""
    link = Link(0.5, 50.0, 0.25, 0.125, 100.0)
    profile = BlockProfile((SMALL, SMALL), link)
    assert profile.scaled(2.0).link == link
    assert profile.scaled(2.0, transfers=True).link == Link(1.0, 25.0, 0.5, 0.25, 50.0)


def test_memory_is_known_when_one_block_says_so() -> None:
    assert not BlockProfile((SMALL, SMALL)).memory_known
    assert BlockProfile((SMALL, replace(SMALL, state_bytes=1))).memory_known


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": (), "teacher_seconds": (), "student_seconds": ()}, "'conv': no measured point"),
        ({"rows": (8, 4, 16)}, r"rows are \[8, 4, 16\], expected ascending"),
        ({"rows": (0, 4, 8)}, r"rows are \[0, 4, 8\], expected ascending counts from 1"),
        ({"teacher_seconds": (1.0,)}, "3 row counts with 1 teacher_seconds"),
        (
            {"student_seconds": (1.0, -1.0, float("nan")), "parameter_bytes": -1},
            "student_seconds holds -1.0, .*student_seconds holds nan, .*parameter_bytes is -1, expected 0",
        ),
        ({"allreduce_ranks": (2, 3)}, "2 sizes of groups with 0 allreduce_seconds"),
        ({"allreduce_ranks": (1, 2), "allreduce_seconds": (0.0, 1.0)}, r"\[1, 2\], expected ascending sizes from 2"),
        ({"allreduce_ranks": (2,), "allreduce_seconds": (-1.0,)}, "allreduce_seconds holds -1.0, expected 0 or more"),
    ],
)
def test_wrong_times(changes: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        replace(SMALL, **changes)  # type: ignore[arg-type]


def test_wrong_profile() -> None:
    with pytest.raises(PlanError, match="no block; expected at least one; a batch of 0 rows"):
        BlockProfile((), batch=0)
    one = replace(SMALL, name="one", allreduce_ranks=(2,), allreduce_seconds=(1.0,))
    with pytest.raises(PlanError, match=r"groups of \[\] in block 'conv', \[2\] in block 'one'; expected the same"):
        BlockProfile((SMALL, one))


# ---------------------------------------------------------------- files


def test_missing_file_and_file_that_is_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read block profile '.*absent.csv': No such file"):
        BlockProfile.load(tmp_path / "absent.csv")
    (tmp_path / "noise.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=r"block profile '.*noise.csv' is not text"):
        BlockProfile.load(tmp_path / "noise.csv")
    with pytest.raises(ConfigError, match="cannot write block profile .*No such file"):
        BlockProfile((SMALL,)).save(tmp_path / "absent" / "blocks.csv")
