"""CSV files of block profiles, and everything that can be wrong in them."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from schedule.blockwise.tasks import block_times

from pipestill.errors import ConfigError
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes

HEADER = "block,rows,teacher_forward_seconds,student_step_seconds,input_bytes_per_row,parameter_bytes"


@st.composite
def measured_blocks(draw: st.DrawFn) -> tuple[BlockTimes, ...]:
    """Blocks whose all-reduces are measured for the same sizes of groups, or for none."""
    sizes = tuple(sorted(draw(st.sets(st.integers(2, 64), max_size=3))))
    seconds = st.lists(st.floats(0.0, 1e6), min_size=len(sizes), max_size=len(sizes)).map(tuple)
    blocks = draw(st.lists(block_times(), min_size=1, max_size=3))
    return tuple(replace(block, allreduce_ranks=sizes, allreduce_seconds=draw(seconds)) for block in blocks)


@given(measured_blocks())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
            ["'rows' is missing", r"'row' is known \(did you mean 'rows'\?\)", "mean 'state_bytes'", "'block' is there 2"],
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
            ["'allreduce_two_seconds' is known", "'allreduce_1_seconds' is of groups of one rank, expected two or more"],
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
