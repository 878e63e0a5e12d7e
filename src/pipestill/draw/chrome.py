"""Traces written to and read from the Trace Event Format, which Perfetto shows."""

import gzip
import json
from pathlib import Path
from typing import Any

from pipestill.draw.boxes import extent, number_of, work_of, write_bytes
from pipestill.errors import ConfigError
from pipestill.schedule.action import Action, Op
from pipestill.schedule.trace import Event, Trace


def chrome_trace(trace: Trace) -> dict[str, Any]:
    """Convert `trace` to the Trace Event Format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

    Each rank is a thread and each action a complete event; `ts` and `dur` are microseconds since the first start. Raises
    `ConfigError` for an empty trace.
    """
    origin, _ = extent(trace)
    process = {"ph": "M", "pid": 1, "tid": 0, "name": "process_name", "args": {"name": "pipestill"}}
    events: list[dict[str, Any]] = [process]
    for rank in range(trace.num_ranks):
        thread = {"ph": "M", "pid": 1, "tid": rank + 1}
        events.append({**thread, "name": "thread_name", "args": {"name": f"rank {rank}"}})
        events.append({**thread, "name": "thread_sort_index", "args": {"sort_index": rank}})
    for event in trace.events:
        action, work = event.action, work_of(event.action, trace)
        # Both ends are rounded to nanoseconds, so that neighbours which touch do not overlap.
        start, end = (round((t - origin) * 1e6, 3) for t in (event.start, event.end))
        args: dict[str, Any] = {"action": str(action), "step": action.step, "stage": action.stage}
        if action.microbatch is not None:
            args["microbatch"] = action.microbatch
        number = number_of(action, trace)
        name = work.letter if number is None or action.op is Op.DATA else f"{work.letter}{number}"
        place = {"ph": "X", "pid": 1, "tid": event.rank + 1, "ts": start, "dur": round(end - start, 3)}
        events.append({**place, "name": name, "cat": work.name, "args": args})
    other = {"cuts": sorted(trace.interruptions), "blockwise": trace.by_block, "window": trace.batches_per_step}
    return {"displayTimeUnit": "ms", "traceEvents": events, "otherData": other}


def write_chrome_trace(trace: Trace, path: str | Path) -> None:
    """Write `chrome_trace(trace)` as JSON, compressed when `path` ends in .gz (Perfetto opens both).

    Raises `ConfigError` for an empty trace or a path that cannot be written.
    """
    data = json.dumps(chrome_trace(trace), separators=(",", ":")).encode()
    write_bytes(Path(path), gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data)


def read_chrome_trace(path: str | Path) -> Trace:
    """Read the trace that `write_chrome_trace` wrote to `path`, its clock starting at 0; `ConfigError` for any other file."""
    try:
        data = Path(path).read_bytes()
        content = json.loads(gzip.decompress(data) if str(path).endswith(".gz") else data)
        entries = content["traceEvents"]
        works = [entry for entry in entries if entry["ph"] == "X"]
        events = tuple(
            Event(e["tid"] - 1, Action.parse(e["args"]["action"]), e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in works
        )
        num_ranks = sum(entry["name"] == "thread_name" for entry in entries)
        other = content["otherData"]  # whose names are older than those of a trace
        return Trace(num_ranks, events, frozenset(other["cuts"]), other.get("blockwise", False), other.get("window", 1))
    except OSError as error:
        raise ConfigError(f"cannot read trace '{path}': {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise ConfigError(f"'{path}' is no trace of pipestill: {type(error).__name__}: {error}") from None
