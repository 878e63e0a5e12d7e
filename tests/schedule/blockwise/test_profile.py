"""Times of blocks between measured points, the terms of the cost model, and files of them."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipestill.costs import Link
from pipestill.errors import ConfigError, PlanError
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes

SMALL = BlockTimes("conv", (4, 8, 16), (2.0, 3.0, 7.0), (5.0, 5.0, 4.0), 100, 1000)
HEADER = "block,rows,teacher_forward_seconds,student_step_seconds,input_bytes_per_row,parameter_bytes"

amounts = st.floats(0.0, 1e6)
num_bytes = st.integers(0, 10**12)


@st.composite
def block_times(draw: st.DrawFn) -> BlockTimes:
    rows = sorted(draw(st.sets(st.integers(1, 512), min_size=1, max_size=4)))
    seconds = st.lists(amounts, min_size=len(rows), max_size=len(rows)).map(tuple)
    name = draw(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=6))
    return BlockTimes(
        name, tuple(rows), draw(seconds), draw(seconds), *(draw(num_bytes) for _ in range(5)), draw(amounts)
    )


@st.composite
def measured_blocks(draw: st.DrawFn) -> tuple[BlockTimes, ...]:
    """Blocks whose all-reduces are measured for the same sizes of groups, or for none."""
    sizes = tuple(sorted(draw(st.sets(st.integers(2, 64), max_size=3))))
    seconds = st.lists(amounts, min_size=len(sizes), max_size=len(sizes)).map(tuple)
    blocks = draw(st.lists(block_times(), min_size=1, max_size=3))
    return tuple(replace(block, allreduce_ranks=sizes, allreduce_seconds=draw(seconds)) for block in blocks)


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
    assert profile.with_link(Link()).relay_seconds(1, 32, 1) == 0.0
    assert profile.with_link(Link()).allreduce_seconds(1, 4) == 0.0


def test_measured_allreduces_replace_those_of_the_links() -> None:
    """Between measured sizes a straight line; above the largest, as many messages as a ring has."""
    profile = BlockProfile((SMALL, SMALL), Link(0.5, 50.0)).with_allreduces((2, 4), [(3.0, 7.0), (0.0, 0.0)])
    assert [profile.allreduce_seconds(0, k) for k in (1, 2, 3, 4, 7)] == [0.0, 3.0, 5.0, 7.0, 14.0]
    assert profile.allreduce_seconds(1, 5) == 0.0
    assert profile.scaled(2.0).allreduce_seconds(0, 2) == 3.0, "of work only"
    everything = profile.scaled(2.0, transfers=True)
    assert everything.allreduce_seconds(0, 2) == 6.0
    assert everything.link == Link(1.0, 25.0)
    assert profile.with_link(Link(1.0)).allreduce_seconds(0, 2) == 2.0, "other links have other all-reduces"


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


@given(measured_blocks())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_saved_profile_loads_equal(tmp_path: Path, blocks: tuple[BlockTimes, ...]) -> None:
    BlockProfile(blocks).save(tmp_path / "blocks.csv")
    assert BlockProfile.load(tmp_path / "blocks.csv").blocks == blocks


def test_file_without_optional_columns(tmp_path: Path) -> None:
    text = f"{HEADER}\n0,1,0.5,1.5,10,20\n0,4,1.0,2.5,10,20\n1,1,0.25,1.0,30,40\n"
    (tmp_path / "blocks.csv").write_text(text)
    profile = BlockProfile.load(tmp_path / "blocks.csv")
    assert profile.blocks == (
        BlockTimes("block 0", (1, 4), (0.5, 1.0), (1.5, 2.5), 10, 20),
        BlockTimes("block 1", (1,), (0.25,), (1.0,), 30, 40),
    )
    profile.save(tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == text


def test_lines_and_columns_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "blocks.csv").write_bytes(
        b"\xef\xbb\xbfrows, block,parameter_bytes,input_bytes_per_row,"
        b"student_step_seconds,teacher_forward_seconds,state_bytes\r\n"
        b"4,1,40,30,1.0,0.25,7\r\n\r\n8,0,20,10,2.5,1.0,6\r\n1,0,20,10,1.5,0.5,6\r\n"
    )
    assert BlockProfile.load(tmp_path / "blocks.csv").blocks == (
        BlockTimes("block 0", (1, 8), (0.5, 1.0), (1.5, 2.5), 10, 20, state_bytes=6),
        BlockTimes("block 1", (4,), (0.25,), (1.0,), 30, 40, state_bytes=7),
    )


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["column 'block' is missing", "column 'rows' is missing", "columns are block, rows"]),
        (HEADER, ["no line follows the header"]),
        (
            HEADER.replace("rows", "row", 1) + ",state_byte,block",
            [
                "'rows' is missing",
                r"'row' is known \(did you mean 'rows'\?\)",
                "mean 'state_bytes'",
                "'block' is there 2",
            ],
        ),
        (
            f"{HEADER}\n0,1,fast,1.5,10,20\n1,2.5,0.5,-1.5,10,nan\n2,0,inf,1,1,1\n",
            [
                "line 2: teacher_forward_seconds is 'fast', expected a number",
                "line 3: rows is '2.5', expected a whole number",
                "line 3: student_step_seconds is -1.5, expected 0 or more",
                "line 3: parameter_bytes is 'nan', expected a whole number",
                "line 4: rows is 0, expected 1 or more",
                "line 4: teacher_forward_seconds is inf, expected 0 or more",
            ],
        ),
        (f"{HEADER}\n0,1,1,1,1\n0,2,1,1,1,1,1\n", ["line 2: 5 cells, the header has 6", "line 3: 7 cells"]),
        (f"{HEADER}\n0,1,1,1,1,1\n2,1,1,1,1,1\n", ["blocks are 0, 2; expected 0 to 1 without a gap"]),
        (f"{HEADER}\n1,1,1,1,1,1\n", ["blocks are 1; expected 0 to 0"]),
        (
            f"{HEADER},allreduce_1_seconds,allreduce_two_seconds\n",
            [
                "'allreduce_two_seconds' is known",
                "'allreduce_1_seconds' is of groups of one rank, expected two or more",
            ],
        ),
        (
            f"{HEADER},allreduce_2_seconds\n0,1,1,1,1,1,0.5\n0,2,1,1,1,1,0.25\n0,3,1,1,1,1,-1\n",
            ["line 4: allreduce_2_seconds is -1", "block 0: allreduce_2_seconds is 0.5 and 0.25, expected the same"],
        ),
        (
            f"{HEADER}\n0,1,1,1,10,20\n0,1,1,1,10,21\n0,2,1,1,11,20\n",
            [
                "block 0: input_bytes_per_row is 10 and 11, expected the same in all its lines",
                "block 0: parameter_bytes is 20 and 21",
                "block 0: 2 lines for 1 rows",
            ],
        ),
        (f'{HEADER}\n0,"1,1,1,1,1\n', ["not CSV: unexpected end of data"]),
        (f"{HEADER}\n" + "x,1,1,1,1,1\n" * 25, ["line 21: block is 'x'", "and 5 more"]),
    ],
)
def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path, text: str, problems: list[str]) -> None:
    (tmp_path / "blocks.csv").write_text(text)
    with pytest.raises(ConfigError, match=r"(?s)block profile '.*blocks.csv':\n.*" + ".*".join(problems)):
        BlockProfile.load(tmp_path / "blocks.csv")


def test_a_line_that_cannot_be_read_is_no_gap(tmp_path: Path) -> None:
    (tmp_path / "blocks.csv").write_text(f"{HEADER}\n0,1,1,1,1,1\none,1,1,1,1,1\n2,1,1,1,1,1\n")
    with pytest.raises(ConfigError, match=r"blocks.csv':\n  line 3: block is 'one', expected a whole number$"):
        BlockProfile.load(tmp_path / "blocks.csv")


def test_missing_file_and_file_that_is_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read block profile '.*absent.csv': No such file"):
        BlockProfile.load(tmp_path / "absent.csv")
    (tmp_path / "noise.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=r"block profile '.*noise.csv' is not text"):
        BlockProfile.load(tmp_path / "noise.csv")
    with pytest.raises(ConfigError, match="cannot write block profile .*No such file"):
        BlockProfile((SMALL,)).save(tmp_path / "absent" / "blocks.csv")
