"""What a schedule and a trace look like."""

import gzip
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipestill import draw
from pipestill.costs import BlockCosts, Costs, Link, StageCosts
from pipestill.errors import ConfigError
from pipestill.schedule import Action, Event, Op, PipelineStructure, Schedule, Trace, generate
from pipestill.schedule.blockwise.costs import BlockwiseCosts
from pipestill.schedule.blockwise.generate import Portion, sliced, staged
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes
from pipestill.schedule.simulate import simulate

ANSI = re.compile(r"\x1b\[[0-9;]*m")
SVG = "{http://www.w3.org/2000/svg}"


def uniform(num_stages: int, forward: float = 1.0) -> StageCosts:
    costs = Costs.uniform(num_stages, forward, forward, 2 * forward)
    return costs.stages([1] * num_stages, [1] * num_stages)


def trace_of(strategy: str, num_stages: int, num_microbatches: int, forward: float = 1.0) -> Trace:
    costs = uniform(num_stages, forward)
    return simulate(generate(strategy, num_stages, num_microbatches, costs=costs), costs)


def measured(num_stages: int = 2, num_microbatches: int = 4, origin: float = 1.7e9) -> Trace:
    """Like what an executor records: uneven, late on its clock, with data, losses and updates that take time."""
    student = [BlockCosts(f"s{i}", 1e-3 + 1e-4 * i, 2.3e-3 - 1e-4 * i, 6e-4) for i in range(num_stages)]
    teacher = [BlockCosts(f"t{i}", 9e-4 + 5e-5 * i) for i in range(num_stages)]
    whole = Costs(tuple(student), tuple(teacher), loss_seconds=7e-4, data_seconds=5e-4)
    costs = whole.stages([1] * num_stages, [1] * num_stages)
    return shifted(simulate(generate("1f1b", num_stages, num_microbatches), costs), origin)


def shifted(trace: Trace, by: float) -> Trace:
    return Trace(trace.num_ranks, tuple(Event(e.rank, e.action, e.start + by, e.end + by) for e in trace.events))


def without_updates(trace: Trace) -> Trace:
    return Trace(trace.num_ranks, tuple(e for e in trace.events if e.action.op is not Op.UPDATE))


EMPTY = Trace(2, ())


# ---------------------------------------------------------------- terminal


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


def test_empty_trace_is_refused_clearly(tmp_path: Path) -> None:
    for attempt in (
        lambda: draw.text(EMPTY),
        lambda: draw.picture([trace_of("gpipe", 2, 2), EMPTY], tmp_path / "a.svg", titles=["a", "b"]),
        lambda: draw.chrome_trace(EMPTY),
        lambda: draw.write_chrome_trace(EMPTY, tmp_path / "a.json"),
    ):
        with pytest.raises(ConfigError, match="the trace is empty"):
            attempt()
    assert list(tmp_path.iterdir()) == []


def test_trace_of_work_that_takes_no_time_is_refused(tmp_path: Path) -> None:
    trace = trace_of("gpipe", 2, 2, forward=0.0)
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw.text(trace)
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw.picture([trace], tmp_path / "a.svg", titles=["a"])


# ---------------------------------------------------------------- table


def test_table_marks_work_for_later_steps() -> None:
    texts = (
        "S0F0@0 S0F1@0 T0F0@1 S0B0@0 T0F1@2 S0B1@0 S0U@0",
        "S1F0@0 S1L0@0 S1B0@0 S1F1@0 S1L1@0 S1B1@0 S1U@0 T1F0@1",
    )
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


# ---------------------------------------------------------------- blocks that train alone


def blockwise_trace(window: int = 1, num_steps: int = 20) -> Trace:
    """Block 0 on two ranks, block 1 on a third, for which a batch takes 4 seconds; or both on one, in windows."""
    link = Link(0.25)
    profile = BlockProfile(tuple(BlockTimes("", (1,), (1.0,), (3.0,), 0, 0) for _ in range(2)), link)
    schedule = staged("hybrid", [(range(1), (0, 1)), (range(1, 2), (2,))])
    if window > 1:
        portions = [[Portion(0, range(window))], [Portion(1, range(window))]]
        schedule = sliced(window, portions, portions, 2, teacher_first=True)
    return simulate(schedule, BlockwiseCosts(profile, 1), num_steps)


def test_text_of_blocks_numbers_work_by_its_block() -> None:
    drawn = draw.text(blockwise_trace(), width=100)
    assert drawn.splitlines()[2].startswith("rank 2 |t1") and "B1---" in drawn and "B0---" in drawn
    assert drawn.splitlines()[-1].split() == (
        ["t", "teacher", "forward", "B", "student", "step", "R", "gradient", "all-reduce", "U", "update", ".", "idle"]
    )


def test_picture_of_blocks_shows_as_many_batches_of_each(tmp_path: Path) -> None:
    """A step of the first is a batch of 4 seconds, one of the second a window of three such."""
    draw.picture([blockwise_trace(), blockwise_trace(3)], tmp_path / "a.svg", titles=["a", "b"], num_steps=1)
    svg, boxes = (tmp_path / "a.svg").read_text(), groups(tmp_path / "a.svg")
    assert svg.count("4 s per batch") == 2 and "student step" in svg and "gradient all-reduce" in svg
    widths = [max(x for x, _ in boxes[f"trace{i}-idle"][0]) for i in (0, 1)]
    assert widths[0] == pytest.approx(widths[1], abs=1e-4)
    assert num_boxes(boxes, "trace1-student-step") == 3 * 2
    assert not num_boxes(boxes, "trace0-backward")


def test_chrome_trace_of_blocks_reads_back(tmp_path: Path) -> None:
    trace = blockwise_trace(3, 5)
    draw.write_chrome_trace(trace, tmp_path / "trace.json")
    read = draw.read_chrome_trace(tmp_path / "trace.json")
    assert read == trace and read.by_block and read.batches_per_step == 3
    events = [e for e in draw.chrome_trace(blockwise_trace())["traceEvents"] if e["ph"] == "X"]
    assert {(e["name"], e["cat"]) for e in events} == {
        ("D", "data"), ("t0", "teacher forward"), ("t1", "teacher forward"), ("B0", "student step"), ("U1", "update"),
        ("B1", "student step"), ("R0", "gradient all-reduce"), ("U0", "update"),
    }  # fmt: skip


# ---------------------------------------------------------------- picture


def groups(path: Path) -> dict[str, list[list[tuple[float, float]]]]:
    """The corners of every box in an SVG, by the id of its group."""
    found = {}
    for group in ET.parse(path).getroot().iter(f"{SVG}g"):
        if group.get("id", "").startswith("trace"):
            outlines = [p.get("d", "") for p in group.iter(f"{SVG}path") if p.get("clip-path")]
            points = [re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", outline) for outline in outlines]
            found[group.get("id", "")] = [[(float(x), float(y)) for x, y in corners] for corners in points]
    return found


def num_boxes(boxes: dict[str, list[list[tuple[float, float]]]], prefix: str) -> int:
    return sum(len(found) for name, found in boxes.items() if name.startswith(prefix))


def test_svg_has_one_box_for_each_piece_of_work(tmp_path: Path) -> None:
    trace = trace_of("gpipe", 3, 4)
    draw.picture([trace], tmp_path / "a.svg", titles=["gpipe"])
    boxes = groups(tmp_path / "a.svg")
    assert len(boxes["trace0-idle"]) == 3
    for name in ("teacher-forward", "student-forward", "backward"):
        assert len(boxes[f"trace0-{name}-0"]) == len(boxes[f"trace0-{name}-1"]) == 3 * 4
    start, end = trace.steady_window(2)
    updates = [e for e in trace.events if e.action.op is Op.UPDATE and start <= e.start <= end]
    assert num_boxes(boxes, "trace0-update") == len(updates)
    assert not any("data" in name or "loss" in name for name in boxes)  # they take no time here


def test_svg_shows_everything_without_updates(tmp_path: Path) -> None:
    trace = without_updates(measured())
    draw.picture([trace], tmp_path / "a.svg", titles=["validation"])
    boxes = groups(tmp_path / "a.svg")
    assert num_boxes(boxes, "trace0-") - len(boxes["trace0-idle"]) == len(trace.events)


def test_traces_share_one_time_axis(tmp_path: Path) -> None:
    traces = [trace_of("gpipe", 2, 4), shifted(trace_of("sequential", 2, 4), 1000.0)]
    draw.picture(traces, tmp_path / "a.svg", titles=["gpipe", "sequential"])
    boxes = groups(tmp_path / "a.svg")
    first, second = ([min(x for x, _ in box) for box in boxes[f"trace{i}-idle"]] for i in (0, 1))
    assert first == second  # both start at 0

    def width(name: str) -> float:
        xs = [x for x, _ in boxes[name][0]]
        return max(xs) - min(xs)

    assert width("trace0-backward-0") == pytest.approx(width("trace1-backward-0"), abs=1e-4)
    seconds = [end - start for start, end in (trace.steady_window(2) for trace in traces)]
    assert width("trace0-idle") / width("trace1-idle") == pytest.approx(seconds[0] / seconds[1], abs=1e-4)
    assert max(y for _, y in boxes["trace0-idle"][1]) < min(y for _, y in boxes["trace1-idle"][0])


def test_picture_says_how_fast_and_how_full(tmp_path: Path) -> None:
    draw.picture([trace_of("gpipe", 2, 4)], tmp_path / "a.svg", titles=["gpipe at $5 a day"])
    svg = (tmp_path / "a.svg").read_text()
    assert "<!-- gpipe at $5 a day -->" in svg
    assert "<!-- 19 s per step, utilisation 84.2% -->" in svg
    assert "<!-- time (s) -->" in svg
    draw.picture([trace_of("gpipe", 2, 4)], tmp_path / "a.svg", titles=["gpipe"], unit=None)
    svg = (tmp_path / "a.svg").read_text()
    assert "<!-- 19 time units per step, utilisation 84.2% -->" in svg
    assert "<!-- time units -->" in svg


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_same_traces_give_same_bytes(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        draw.picture([measured(), trace_of("fill", 3, 4)], tmp_path / f"{name}.{suffix}", titles=["1f1b", "fill"])
    first, second = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("a", "b"))
    assert first == second
    assert first.startswith(b"<?xml" if suffix == "svg" else b"\x89PNG")


def test_no_text_overlaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    wide = [trace_of("1f1b", 16, 16), measured(4, 12), trace_of("sequential", 2, 4), trace_of("gpipe", 3, 120)]
    for traces in ([wide[0]], [wide[1]], [wide[2]], wide):
        draw.picture(traces, tmp_path / "a.png", titles=["a long title of one strategy"] * len(traces))
    assert len(drawn) == 4
    for figure in drawn:
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        texts = [t for axes in figure.axes for t in (*axes.texts, *axes.get_yticklabels())]
        last = figure.axes[-1]
        texts += [t for t in last.get_xticklabels() if t.get_position()[0] <= last.get_xlim()[1]]
        texts += [last.xaxis.label, *figure.legends[0].get_texts()]
        rows = defaultdict[int, list[tuple[float, float, str]]](list)
        for text in texts:
            extent = text.get_window_extent(renderer)
            assert figure.bbox.padded(1).containsx(extent.x0), text
            assert figure.bbox.padded(1).containsx(extent.x1), text
            assert figure.bbox.padded(1).containsy(extent.y0), text
            for y in range(int(extent.y0), int(extent.y1) + 1):
                rows[y].append((extent.x0, extent.x1, text.get_text()))
        for spans in rows.values():
            spans.sort()
            for (_, end, left), (start, _, right) in pairwise(spans):
                assert end <= start, (left, right)


def test_picture_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    """No pyplot, no global settings, and nothing imported before a picture is asked for."""
    script = """
import sys
from pipestill import draw
from pipestill.schedule import generate
from pipestill.schedule.simulate import simulate
from pipestill.costs import Costs
assert "matplotlib" not in sys.modules
costs = Costs.uniform(1, 1, 1, 2).stages([1], [1])
trace = simulate(generate("gpipe", 1, 1), costs)
import matplotlib
before = matplotlib.rcParams.copy()
draw.picture([trace], sys.argv[1], titles=["a"])
assert matplotlib.rcParams.copy() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.svg")], check=True, timeout=120)


def test_picture_refuses_other_suffixes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.svg or \.png"):
        draw.picture([measured()], tmp_path / "a.jpg", titles=["a"])


def test_picture_wants_a_title_a_trace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 titles for 1 traces"):
        draw.picture([measured()], tmp_path / "a.svg", titles=["a", "b"])
    with pytest.raises(ConfigError, match="0 titles for 0 traces"):
        draw.picture([], tmp_path / "a.svg", titles=[])
    with pytest.raises(ConfigError, match="expected at least 1"):
        draw.picture([measured()], tmp_path / "a.svg", titles=["a"], num_steps=0)


def test_path_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken.svg").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "taken.svg", tmp_path / "nowhere" / "a.svg", tmp_path / "file" / "a.svg"):
        with pytest.raises(ConfigError, match=re.escape(f"cannot write '{path}'")):
            draw.picture([trace_of("gpipe", 1, 1)], path, titles=["a"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.svg"]


# ---------------------------------------------------------------- Chrome trace


def test_chrome_trace_has_a_thread_a_rank_and_an_event_an_action() -> None:
    trace = measured()
    data = draw.chrome_trace(trace)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    named = [e for e in data["traceEvents"] if e["ph"] == "M"]
    threads = {e["tid"]: e["args"]["name"] for e in named if e["name"] == "thread_name"}
    assert threads == {1: "rank 0", 2: "rank 1"}
    assert [e["args"]["name"] for e in named if e["name"] == "process_name"] == ["pipestill"]
    events = [e for e in data["traceEvents"] if e["ph"] == "X"]
    assert len(events) == len(trace.events)
    for event, drawn in zip(trace.events, events, strict=True):
        assert Action.parse(drawn["args"]["action"]) == event.action
        assert (drawn["args"]["step"], drawn["args"]["stage"]) == (event.action.step, event.action.stage)
        assert drawn["args"].get("microbatch") == event.action.microbatch
        assert drawn["dur"] == pytest.approx(event.seconds * 1e6, abs=0.5)  # a clock at 1.7e9 s has 0.24 us
        assert threads[drawn["tid"]] == f"rank {event.rank}"
    assert min(e["ts"] for e in events) == 0


def test_chrome_trace_names_and_categories() -> None:
    events = [e for e in draw.chrome_trace(measured())["traceEvents"] if e["ph"] == "X"]
    assert {(e["name"].rstrip("0123456789"), e["cat"]) for e in events} == {
        ("D", "data"),
        ("t", "teacher forward"),
        ("F", "student forward"),
        ("L", "loss"),
        ("B", "backward"),
        ("U", "update"),
    }


def test_every_kind_of_work_has_a_name_and_a_letter(tmp_path: Path) -> None:
    """Backwards in two halves, norms and a momentum teacher's updates too."""
    costs = replace(uniform(2), weight=(1.0, 1.0), update=(0.5, 0.5), ema=(0.5, 0.5))
    schedule = generate("fill", 2, 3, costs=costs, momentum=True, split_backward=True, clip=True)
    trace = simulate(schedule, costs)
    names = {
        (e["name"].rstrip("0123456789"), e["cat"]) for e in draw.chrome_trace(trace)["traceEvents"] if e["ph"] == "X"
    }
    assert names == {
        ("D", "data"),
        ("t", "teacher forward"),
        ("F", "student forward"),
        ("L", "loss"),
        ("I", "input gradient"),
        ("W", "weight gradient"),
        ("N", "gradient norm"),
        ("U", "update"),
        ("E", "teacher update"),
    }
    legend = draw.text(trace).splitlines()[-1]
    assert "I input gradient  W weight gradient  U update  E teacher update" in legend
    draw.picture([trace], tmp_path / "a.svg", titles=["fill"])
    boxes = groups(tmp_path / "a.svg")
    for name in ("input-gradient", "weight-gradient"):
        assert len(boxes[f"trace0-{name}-0"]) == len(boxes[f"trace0-{name}-1"]) == 2 * 3


def test_neighbours_in_a_chrome_trace_do_not_overlap() -> None:
    """Perfetto drops or nests a slice that starts before the one before it has ended."""
    ends = defaultdict[int, float](float)
    for event in draw.chrome_trace(trace_of("1f1b", 4, 7, forward=1 / 3e4))["traceEvents"]:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert event["ts"] >= ends[event["tid"]] - 5e-4  # half of a nanosecond
            ends[event["tid"]] = event["ts"] + event["dur"]


def test_written_chrome_trace_reads_back(tmp_path: Path) -> None:
    trace = trace_of("fill", 2, 3)
    for name in ("trace.json", "trace.json.gz", "again.json.gz"):
        draw.write_chrome_trace(trace, tmp_path / name)
    expected = draw.chrome_trace(trace)
    assert json.loads((tmp_path / "trace.json").read_text()) == expected
    packed = (tmp_path / "trace.json.gz").read_bytes()
    assert json.loads(gzip.decompress(packed)) == expected
    assert (tmp_path / "again.json.gz").read_bytes() == packed
    assert len(list(tmp_path.iterdir())) == 3
