"""Traces as boxes: the looks, labels and windows that all pictures have in common."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Literal

from pipestill.errors import ConfigError
from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.trace import Trace

Unit = Literal["s"] | None
"""The unit of the numbers on a time axis: seconds (shown as s, ms or us, whichever reads best), or None for plain time units."""

ROUNDING = 1e-6
INSTANT = "U"  # shown even when it takes no time, since it ends a step


@dataclass(frozen=True, slots=True)
class Work:
    """The look of one kind of work; even steps have the first and odd steps the second of each pair."""

    letter: str
    name: str
    colours: tuple[str, str]
    terminal_colours: tuple[int, int]  # numbers among the 256 colours of ANSI terminals
    inks: tuple[str, str]


WORKS = {  # colours that stay apart for colour-blind readers, and from each other's shades
    (Role.STUDENT, Op.DATA): Work("D", "data", ("#9a9a9a", "#9a9a9a"), (247, 247), ("black", "black")),
    (Role.TEACHER, Op.FORWARD): Work("t", "teacher forward", ("#12784a", "#a5e0a8"), (29, 151), ("white", "black")),
    (Role.STUDENT, Op.FORWARD): Work("F", "student forward", ("#1457a8", "#79a8e8"), (25, 111), ("white", "black")),
    (Role.STUDENT, Op.LOSS): Work("L", "loss", ("#8f2f7a", "#d07fbf"), (90, 175), ("white", "black")),
    (Role.STUDENT, Op.BACKWARD): Work("B", "backward", ("#e69f00", "#fad58a"), (172, 222), ("black", "black")),
    (Role.STUDENT, Op.INPUT): Work("I", "input gradient", ("#e69f00", "#fad58a"), (172, 222), ("black", "black")),
    (Role.STUDENT, Op.WEIGHT): Work("W", "weight gradient", ("#c4603c", "#eeb49c"), (130, 216), ("white", "black")),
    (Role.STUDENT, Op.REDUCE): Work("R", "gradient all-reduce", ("#6a4fa3", "#b9a6dd"), (61, 146), ("white", "black")),
    (Role.STUDENT, Op.GATHER): Work("G", "shared gradients", ("#777777", "#777777"), (244, 244), ("white", "white")),
    (Role.STUDENT, Op.NORM): Work("N", "gradient norm", ("#555555", "#555555"), (240, 240), ("white", "white")),
    (Role.STUDENT, Op.UPDATE): Work("U", "update", ("#222222", "#222222"), (124, 124), ("white", "white")),
    (Role.TEACHER, Op.EMA): Work("E", "teacher update", ("#0b4f31", "#0b4f31"), (22, 22), ("white", "white")),
}
STUDENT_STEP = replace(WORKS[Role.STUDENT, Op.BACKWARD], name="student step")
"""The look of a student's backward in blockwise training, which is its forward, loss and backward."""

LEGEND = tuple(w for op, work in WORKS.items() for w in ((work, STUDENT_STEP) if op[1] is Op.BACKWARD else (work,)))
"""Every kind of work, in the order of legends."""


def work_of(action: Action, trace: Trace) -> Work:
    """The look of an action of a trace."""
    return STUDENT_STEP if trace.by_block and action.op is Op.BACKWARD else WORKS[action.role, action.op]


def number_of(action: Action, trace: Trace) -> int | None:
    """The number that tells an action from the like work around it in a trace: its block, or its microbatch if it has one."""
    return action.stage if trace.by_block else action.microbatch


@dataclass(frozen=True, slots=True)
class Box:
    """One action inside a window, in seconds from the start of the window and clipped to it.

    `number` is the one of `number_of`.
    """

    rank: int
    work: Work
    number: int | None
    step: int
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """The length of the box in seconds."""
        return self.end - self.start


def extent(trace: Trace) -> tuple[float, float]:
    """The first start and the last end of a trace, in seconds; `ConfigError` if it is empty."""
    if not trace.events:
        raise ConfigError("the trace is empty: no rank has recorded any work; run or simulate at least one step")
    return min(e.start for e in trace.events), max(e.end for e in trace.events)


def window(trace: Trace, num_steps: int, start: float | None = None, end: float | None = None) -> tuple[float, float]:
    """The start and end, in seconds, of what a picture shows: the steady steps, unless `start` or `end` say otherwise."""
    extent(trace)
    steady_start, steady_end = trace.steady_window(num_steps)
    start = steady_start if start is None else start
    end = steady_end if end is None else end
    if not (isfinite(start) and isfinite(end) and start < end):
        raise ConfigError(f"nothing to draw between {start:g} s and {end:g} s; expected an end after the start")
    return start, end


def boxes_in(trace: Trace, start: float, end: float) -> Iterator[Box]:
    """The boxes that a window shows, in the order of the trace; work that takes no time is left out, but for updates."""
    for event in trace.events:
        action = event.action
        work = work_of(action, trace)
        if event.start < end and event.end > start and event.seconds > 0:
            shown = max(event.start, start) - start, min(event.end, end) - start
        elif work.letter == INSTANT and start <= event.start <= event.end <= end:
            shown = event.start - start, event.end - start
        else:
            continue
        yield Box(event.rank, work, number_of(action, trace), action.step, *shown)


def scale(span: float, unit: Unit) -> tuple[float, str]:
    """The factor and the unit with which seconds up to `span` read best, such as 1000 and ms for 0.02 seconds."""
    if unit is None:
        return 1.0, "time units"
    return next(((f, u) for f, u in ((1.0, "s"), (1e3, "ms")) if span * f >= 1.0), (1e6, "us"))


def summary(trace: Trace, boxes: Iterable[Box], span: float, unit: Unit) -> str:
    """Seconds and utilisation of the steady state in words, or of all that is shown where there is none."""
    steady = trace.seconds_per_step / trace.batches_per_step
    each = "batch" if trace.by_block else "step"
    busy = trace.utilisation if steady else sum(b.seconds for b in boxes) / (span * trace.num_ranks)
    factor, symbol = scale(steady or span, unit)
    amount = (steady or span) * factor
    digits = f"{amount:.0f}" if amount >= 1000 else f"{amount:.3g}"
    return f"{digits} {symbol}{f' per {each}' if steady else ''}, utilisation {busy:.1%}"


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one go: a reader never sees half a file."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)  # a device or a pipe, such as /dev/null: nothing may take its place
            return
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise ConfigError(f"cannot write '{path}': {error.strerror}") from None


def typical_seconds(boxes: Iterable[Box]) -> dict[str, float]:
    """The median seconds of forwards and of backwards, by their letters."""
    seconds = defaultdict[str, list[float]](list)
    for box in boxes:
        if box.work.letter in "tFBIW":
            seconds[box.work.letter].append(box.seconds)
    return {letter: median(values) for letter, values in seconds.items()}
