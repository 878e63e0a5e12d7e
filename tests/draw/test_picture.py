"""Timelines as SVG and PNG."""

import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from draw.traces import blockwise_trace, groups, measured, num_boxes, shifted, trace_of, without_updates

from pipestill import draw
from pipestill.errors import ConfigError
from pipestill.schedule import Op


def test_picture_of_blocks_shows_as_many_batches_of_each(tmp_path: Path) -> None:
    """A step of the first is a batch of 4 seconds, one of the second a window of three such."""
    draw.picture([blockwise_trace(), blockwise_trace(3)], tmp_path / "a.svg", titles=["a", "b"], num_steps=1)
    svg, boxes = (tmp_path / "a.svg").read_text(), groups(tmp_path / "a.svg")
    assert svg.count("4 s per batch") == 2 and "student step" in svg and "gradient all-reduce" in svg
    widths = [max(x for x, _ in boxes[f"trace{i}-idle"][0]) for i in (0, 1)]
    assert widths[0] == pytest.approx(widths[1], abs=1e-4)
    assert num_boxes(boxes, "trace1-student-step") == 3 * 2
    assert not num_boxes(boxes, "trace0-backward")


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
