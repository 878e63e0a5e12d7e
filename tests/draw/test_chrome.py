"""Traces in the Trace Event Format, there and back."""

import gzip
import json
from collections import defaultdict
from pathlib import Path

import pytest
from draw.traces import blockwise_trace, measured, trace_of

from pipestill import draw
from pipestill.schedule import Action


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
