"""What all pictures of a trace have in common."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from draw.traces import EMPTY, groups, trace_of, uniform

from pipestill import draw
from pipestill.errors import ConfigError
from pipestill.schedule import generate
from pipestill.schedule.simulate import simulate


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


def test_path_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken.svg").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "taken.svg", tmp_path / "nowhere" / "a.svg", tmp_path / "file" / "a.svg"):
        with pytest.raises(ConfigError, match=re.escape(f"cannot write '{path}'")):
            draw.picture([trace_of("gpipe", 1, 1)], path, titles=["a"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.svg"]


def test_every_kind_of_work_has_a_name_and_a_letter(tmp_path: Path) -> None:
    """Backwards in two halves, norms and a momentum teacher's updates too."""
    costs = replace(uniform(2), weight=(1.0, 1.0), update=(0.5, 0.5), ema=(0.5, 0.5))
    schedule = generate("fill", 2, 3, costs=costs, momentum=True, split_backward=True, clip=True)
    trace = simulate(schedule, costs)
    names = {(e["name"].rstrip("0123456789"), e["cat"]) for e in draw.chrome_trace(trace)["traceEvents"] if e["ph"] == "X"}
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
