"""Timelines and tables for terminals."""

import re

import pytest
from draw.traces import blockwise_trace, measured, shifted, trace_of, without_updates
from hypothesis import given, settings, strategies as st

from pipestill import draw
from pipestill.errors import ConfigError
from pipestill.schedule import Action, PipelineStructure, Schedule, generate
from pipestill.schedule.blockwise.generate import staged

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def test_text_of_gpipe() -> None:
    assert draw.text(trace_of("gpipe", 2, 2), width=60) == (
        "rank 0 |t0t1F0F1......B0--B1--t0t1F0F1......B0--B1--|\n"
        "rank 1 |..t0t1F0F1B0--B1--U.....t0t1F0F1B0--B1--U...|\n"
        "        0         5         10        15        20 s\n"
        "        t teacher forward  F student forward  B backward  U update  . idle\n"
    )


def test_text_gives_equal_work_equal_cells_at_any_width() -> None:
    assert draw.text(trace_of("1f1b", 2, 3), width=130).splitlines()[:2] == [
        "rank 0 |" + 2 * "t0--t1--t2--F0--F1--........B0------F2--B1------....B2------" + "|",
        "rank 1 |" + 2 * "....t0--t1--t2--F0--B0------F1--B1------F2--B2------U......." + "|",
    ]


def test_text_shows_letters_alone_where_numbers_have_no_room() -> None:
    assert draw.text(trace_of("gpipe", 2, 2), width=32, unit=None).splitlines()[:3] == [
        "rank 0 |ttFF...B0B1ttFF...B0B1|",
        "rank 1 |.ttFFB0B1U..ttFFB0B1U.|",
        "        0         10 time units",
    ]


def test_text_of_a_chosen_window_counts_from_its_start() -> None:
    assert draw.text(trace_of("gpipe", 2, 2), width=60, start=12.5, end=20, unit=None).splitlines()[:3] == [
        "rank 0 |t1-F0----F1----..................B0----------|",
        "rank 1 |t0-t1----F0----F1----B0----------B1----------|",
        "        0           2           4           6 time units",
    ]


def test_text_of_measured_work_shows_all_its_kinds() -> None:
    drawn = draw.text(measured(), width=90)
    assert "ms" in drawn.splitlines()[-2]
    assert drawn.splitlines()[-1].split("  ") == [
        *("", "", "", ""),
        *("D data", "t teacher forward", "F student forward", "L loss", "B backward", "U update", ". idle"),
    ]


def test_text_does_not_depend_on_where_the_clock_starts() -> None:
    trace = trace_of("fill", 4, 4, forward=0.25)
    assert draw.text(shifted(trace, 4096.0)) == draw.text(trace)


def test_text_in_colour_has_the_same_cells() -> None:
    trace = trace_of("fill", 3, 4)
    coloured, plain = draw.text(trace, colour=True), draw.text(trace)
    assert "\x1b[" not in plain
    assert ANSI.sub("", coloured) == plain.replace("-", " ")
    assert coloured.count("\x1b[0m") == len(ANSI.findall(coloured)) / 2  # every colour ends


def test_text_tells_two_steps_apart_in_colour() -> None:
    colours = set(re.findall(r"\x1b\[([0-9;]+)mt0", draw.text(trace_of("gpipe", 2, 2), colour=True)))
    assert len(colours) == 2


def test_text_without_updates_shows_everything() -> None:
    trace = without_updates(measured())
    first, last = min(e.start for e in trace.events), max(e.end for e in trace.events)
    assert draw.text(trace) == draw.text(trace, start=first, end=last)


@given(width=st.integers(30, 250), forward=st.floats(1e-9, 1e6), start=st.floats(0, 30), length=st.floats(0.01, 100))
@settings(max_examples=60, deadline=None)
def test_text_keeps_to_its_width(width: int, forward: float, start: float, length: float) -> None:
    trace = trace_of("1f1b", 2, 3, forward)
    drawn = draw.text(trace, width=width, start=start * forward, end=(start + length) * forward)
    lines = drawn.splitlines()
    assert len(lines[0]) == len(lines[1]) <= width
    assert len(lines[2].rstrip()) <= width
    assert set("".join(lines[:2])) <= set("rank tFBU0123456789|.-")


@pytest.mark.parametrize(("start", "end"), [(5.0, 5.0), (6.0, 5.0), (float("nan"), 5.0), (0.0, float("inf"))])
def test_text_of_an_empty_window_is_refused(start: float, end: float) -> None:
    with pytest.raises(ConfigError, match="expected an end after the start"):
        draw.text(trace_of("gpipe", 2, 2), start=start, end=end)


def test_table_marks_work_for_later_steps() -> None:
    texts = ("S0F0@0 S0F1@0 T0F0@1 S0B0@0 T0F1@2 S0B1@0 S0U@0", "S1F0@0 S1L0@0 S1B0@0 S1F1@0 S1L1@0 S1B1@0 S1U@0 T1F0@1")
    rows = tuple(tuple(map(Action.parse, text.split())) for text in texts)
    schedule = Schedule("mine", PipelineStructure((0, 1), (0, 1), num_microbatches=2), rows, stash=(2, 1), run_ahead=2)
    assert draw.schedule_table(schedule) == (
        "rank 0 | F0 F1 t0@1 B0 t1@2 B1 U\n"
        "rank 1 | F0 L0 B0   F1 L1   B1 U t0@1\n"
    )  # fmt: skip


def test_table_with_transfers() -> None:
    assert draw.schedule_table(generate("gpipe", 2, 1), transfers=True) == (
        "rank 0 | D@2   D@2>1 t0 t0>1 B0<1 F0 F0>1 B0     U\nrank 1 | D@2<0 F0<0  t0 F0   L0   B0 B0>0 t0@1<0 U\n"
    )


def test_table_names_stages_where_a_rank_holds_several() -> None:
    structure = PipelineStructure(student_ranks=(0, 0), teacher_ranks=(), num_microbatches=1)
    schedule = Schedule("folded", structure, (tuple(structure.actions()),), stash=(2,), run_ahead=0)
    assert draw.schedule_table(schedule) == "rank 0 | S0F0 S1F0 S1L0 S1B0 S0B0 S0U S1U\n"


def test_table_of_blocks_names_shares_where_there_are_several() -> None:
    schedule = staged("hybrid", [(range(1), (0, 1)), (range(1, 2), (2,))])
    assert draw.schedule_table(schedule) == (
        "rank 0 | T0.0 B0.0 R0.0 U0.0\n"
        "rank 1 | T0.1 B0.1 R0.1 U0.1\n"
        "rank 2 | T1   B1   U1\n"
    )  # fmt: skip
    first = draw.schedule_table(schedule, transfers=True).splitlines()[0]
    assert " ".join(first.split()) == "rank 0 | D@2 D@2>1 D@2>2 T0.0 T0.0>2 B0.0 R0.0 U1<2 U0.0"


def test_text_of_blocks_numbers_work_by_its_block() -> None:
    drawn = draw.text(blockwise_trace(), width=100)
    assert drawn.splitlines()[2].startswith("rank 2 |t1") and "B1---" in drawn and "B0---" in drawn
    assert drawn.splitlines()[-1].split() == (
        ["t", "teacher", "forward", "B", "student", "step", "R", "gradient", "all-reduce", "U", "update", ".", "idle"]
    )
