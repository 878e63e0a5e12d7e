"""Parts of a batch's rows, and who takes which of them through a block."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from pipestill.schedule.blockwise.shares import (
    WHOLE,
    Share,
    blocks_in,
    common,
    equal_shares,
    overlap,
    parse_shares,
    rows_of_part,
    share_lines,
    tiles,
)


@given(st.integers(0, 30), st.sets(st.fractions(0, 1), max_size=6))
def test_parts_that_touch_hold_every_row_once(rows: int, cuts: set[Fraction]) -> None:
    edges = sorted({Fraction(0), *cuts, Fraction(1)})
    slices = [rows_of_part(part, rows) for part in pairwise(edges)]
    assert [row for part in slices for row in range(rows)[part]] == list(range(rows))


@pytest.mark.parametrize("part", [(Fraction(1, 2), Fraction(1, 2)), (Fraction(1, 2), Fraction(3, 2)), WHOLE[::-1]])
def test_a_share_has_rows(part: tuple[Fraction, Fraction]) -> None:
    with pytest.raises(ValueError, match=r"a share of rows .*; expected more than none, from 0 to 1"):
        Share(0, 0, part)


def part(first: int, end: int) -> tuple[Fraction, Fraction]:
    """A part in sixths."""
    return Fraction(first, 6), Fraction(end, 6)


def test_common_rows() -> None:
    assert common(part(0, 4), part(2, 6)) == part(2, 4) and overlap(part(0, 4), part(2, 6))
    assert not overlap(part(0, 3), part(3, 6))


def test_tiles_are_all_rows_once() -> None:
    assert tiles([part(3, 6), part(0, 3)], WHOLE)
    assert not tiles([part(0, 3)], WHOLE)  # a gap at the end
    assert not tiles([part(0, 4), part(3, 6)], WHOLE)  # twice
    assert tiles([part(1, 2), part(2, 3)], part(1, 3))


def test_equal_shares() -> None:
    assert [str(share) for share in equal_shares([4, 2, 3], batch=1)] == ["1@4:0-1/3", "1@2:1/3-2/3", "1@3:2/3-1"]
    assert equal_shares([5]) == (Share(0, 5),)


def test_lines_are_read_back() -> None:
    blocks = [(Share(0, 0), Share(1, 2)), (), equal_shares([0, 1])]
    lines = share_lines("teacher", blocks)
    assert lines == ["teacher 0: 0@0 1@2", "teacher 1: none", "teacher 2: 0@0:0-1/2 0@1:1/2-1"]
    fields = dict(line.split(": ") for line in lines)
    assert blocks_in(fields) == range(3)
    assert [parse_shares(f"teacher {i}", fields) for i in range(3)] == blocks
    assert fields == {}


@pytest.mark.parametrize("text", ["", "0", "0@", "a@0", "0@0:0-0.5", "0@0:0-1/0", "0@-1", "00@1"])
def test_wrong_shares(text: str) -> None:
    with pytest.raises(ValueError, match="expected shares like 0@1"):
        parse_shares("student 3", {"student 3": text})
