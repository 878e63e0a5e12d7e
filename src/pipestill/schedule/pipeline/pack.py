"""Packs a frozen teacher's forwards into the idle gaps of a student's timeline.

    rank 0, student alone      F0 F1 F2 .. .. B0 .. B1 .. B2 U      (a steady period; ..: idle)
    slots of the teacher                T  T     T
    which forwards these are            t1 t2    t0                 (t: one for the step after)

A frozen teacher may run any step ahead, so its forwards are placed in two steps: when a rank runs some forward of the teacher
(`packed`), and then which step and unit each of these is (`labelled`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, inf

from pipestill.costs import StageCosts
from pipestill.schedule.action import Action, Lane, Op, Role
from pipestill.schedule.pipeline.needs import lane
from pipestill.schedule.pipeline.structure import PipelineStructure
from pipestill.schedule.pipeline.work import Rows, Timed
from pipestill.schedule.trace import Event, Trace

POLICIES = ("largest", "earliest", "latest")
"""Orders in which gaps are filled: the largest first, or in the order of time from either end."""

_ROUNDING = 1e-9


@dataclass(slots=True)
class _Gap:
    """A time in which a rank idles, from whose start on it is filled."""

    start: float
    left: float
    """Idle seconds that are not filled; less than 0 where more was put in than fits."""
    filled: float = 0.0
    """Seconds that are filled."""


@dataclass(frozen=True, slots=True)
class Window:
    """One rank's steady period of the student alone."""

    work: tuple[Timed, ...]
    gaps: tuple[tuple[float, float], ...]
    """Start and seconds of each time in which the rank idles."""
    period: float
    """Seconds of the period, the same on every rank."""


def idle_windows(student: Trace, costs: StageCosts, structure: PipelineStructure) -> list[Window]:
    """Find where each rank idles in a student's steady state, once steps follow each other as fast as the loads allow.

    Args:
        student: the simulated student alone
        costs: seconds of each kind of work on each stage
        structure: what a step computes, the teacher's forwards included
    """
    steps = student.steps()
    steady = steps[len(steps) // 2]
    limit = costs.limit_seconds_per_step(structure.num_microbatches, structure.teacher_views)
    period = max(student.seconds_per_step, limit)
    windows = []
    for rank in range(student.num_ranks):
        events = [
            event
            for event in student.events
            if event.rank == rank and event.action.step == steady and event.action.op is not Op.DATA
        ]
        events.sort(key=lambda event: (event.start, event.end))
        work = tuple(Timed(event.start, event.action.at(0)) for event in events)
        windows.append(Window(work, _gaps(events, period), period))
    return windows


def _gaps(events: Sequence[Event], period: float) -> tuple[tuple[float, float], ...]:
    """Start and seconds of the times between a rank's events, and of that until the first event of the next period."""
    gaps = []
    free = events[0].start
    next_period = events[0].start + period
    for start, end in [*((event.start, event.end) for event in events), (next_period, next_period)]:
        if start - free > _ROUNDING * period:
            gaps.append((free, start - free))
        free = end
    return tuple(gaps)


def packed(windows: Sequence[Window], structure: PipelineStructure, costs: StageCosts, policy: str) -> Rows | None:
    """Put the teacher's forwards into the gaps of every rank, by a policy of `POLICIES`; None where `labelled` finds none."""
    units, views = structure.num_units(Role.TEACHER), structure.teacher_views
    mean_view = sum(costs.views[:views]) / views
    rows = []
    for window, seconds in zip(windows, costs.teacher, strict=True):
        slots = [Timed(start, None) for start in _slots(window, units, seconds * mean_view * costs.interference, policy)]
        rows.append(sorted((*slots, *window.work), key=lambda timed: (timed.start, timed.action is not None)))
    return labelled(rows, structure, costs, windows[0].period)


def _slots(window: Window, units: int, seconds: float, policy: str) -> list[float]:
    """Start times of teacher forwards of `seconds` each: as many as fit in each gap, the rest where most is left."""
    gaps = [_Gap(*gap) for gap in window.gaps]
    order = {"largest": lambda gap: -gap.left, "earliest": lambda gap: gap.start, "latest": lambda gap: -gap.start}[policy]
    starts: list[float] = []
    for gap in sorted(gaps, key=order):
        todo = units - len(starts)
        fitting = floor(gap.left / seconds + _ROUNDING) if gap.left < todo * seconds else todo
        starts += [gap.start + i * seconds for i in range(fitting)]
        gap.left -= fitting * seconds
        gap.filled = fitting * seconds
    while len(starts) < units:
        if gaps:
            gap = max(gaps, key=lambda gap: gap.left)
            starts.append(gap.start + gap.filled)
            gap.left -= seconds
            gap.filled += seconds
        else:
            starts.append(window.work[-1].start)
    return sorted(starts)


def labelled(rows: Sequence[Sequence[Timed]], structure: PipelineStructure, costs: StageCosts, period: float) -> Rows | None:
    """Find which forward of a frozen teacher each None in `rows` is.

    The teacher's forwards of all steps form one sequence: step * units + unit. A rank runs all units of one step in every
    period, in order, so what it runs is told by one number, its shift: slot q, counted over all periods, runs forward
    q + shift. The last rank's shift is the smallest that has every target ready for the losses that take something of it; the
    ranks before follow from it, and from what losses take of their own stages.
    None when links are so slow that the teacher would have to be more than two steps ahead a stage.
    """
    units = structure.num_units(Role.TEACHER)
    needed_by = [inf] * units  # of the next rank, for each unit
    shifts: list[int] = []  # of the ranks, the last one first
    for rank in reversed(range(len(rows))):
        slots = [timed.start for timed in rows[rank] if timed.action is None]
        seconds = _teacher_seconds(rank, structure, costs)
        needed_by = list(map(min, needed_by, _needed_by(rank, rows, structure)))
        shift = _shift(slots, needed_by, seconds, period, most=2 * units * (len(rows) + 1))
        if shift is None:
            return None
        shifts.append(shift)
        needed_by = [_time_of(unit - shift, slots, period) for unit in range(units)]
    return [_row(rank, row, shift, units) for rank, (row, shift) in enumerate(zip(rows, reversed(shifts), strict=True))]


def _needed_by(stage: int, rows: Sequence[Sequence[Timed]], structure: PipelineStructure) -> list[float]:
    """For each unit of a teacher's stage, the start of the first loss that takes something of it; inf without one."""
    needed_by = [inf] * structure.num_units(Role.TEACHER)
    for start, action in (timed for row in rows for timed in row):
        if action is None or action.op is not Op.LOSS or action.microbatch is None:
            continue
        if stage in structure.taught_by(action.stage):
            for unit in structure.units_of_loss(action.microbatch, Role.TEACHER):
                needed_by[unit] = min(needed_by[unit], start)
    return needed_by


def _teacher_seconds(rank: int, structure: PipelineStructure, costs: StageCosts) -> float:
    """At most how long a forward of the teacher takes on a rank, and its result to the other ranks that take it."""
    seconds = costs.teacher[rank] * max(costs.views[: structure.teacher_views]) * costs.interference
    forward = Action(Role.TEACHER, rank, Op.FORWARD, 0, 0)
    num_bytes = []
    for other in range(structure.num_ranks):
        if other != rank and lane(forward, other, structure) is Lane.TEACHER:
            output = costs.teacher_bytes[rank] if costs.teacher_bytes and structure.passes_output(rank, other) else 0
            features = structure.features_to(rank, other) if costs.feature_bytes else []
            num_bytes.append(output + sum(costs.feature_bytes[number] for number in features))
    return seconds + (costs.link.seconds(max(num_bytes)) if num_bytes else 0.0)


def _shift(slots: Sequence[float], needed_by: Sequence[float], seconds: float, period: float, most: int) -> int | None:
    """The least shift, up to `most`, with which every unit's output is there in time; None where there is none."""
    for shift in range(most + 1):
        ends = (_time_of(unit - shift, slots, period) + seconds for unit in range(len(needed_by)))
        if all(end <= needed + _ROUNDING * period for end, needed in zip(ends, needed_by, strict=True)):
            return shift
    return None


def _time_of(slot: int, slots: Sequence[float], period: float) -> float:
    """The start of a slot, counted over all periods: slots of the period before are below 0."""
    periods, index = divmod(slot, len(slots))
    return slots[index] + periods * period


def _row(rank: int, row: Sequence[Timed], shift: int, units: int) -> list[Action]:
    """A rank's row with its teacher's forwards named, as a period that ends with the update."""
    actions: list[Action] = []
    slot = 0
    for _, action in row:
        if action is None:
            step, unit = divmod(slot + shift, units)
            action = Action(Role.TEACHER, rank, Op.FORWARD, unit, step)
            slot += 1
        actions.append(action)
    return _up_to_update(actions)


def _up_to_update(row: list[Action]) -> list[Action]:
    """The same endless row with the update right after the last backward, and the period cut there.

    So ranks pass from step to step together, and each posts its receives for a batch when it already knows that there is one.
    """
    ends = [action for action in row if action.op in (Op.GATHER, Op.NORM, Op.UPDATE)]
    row = [action for action in row if action not in ends]
    end = 1 + max(i for i, action in enumerate(row) if action.op in (Op.BACKWARD, Op.WEIGHT))
    return [*(action.at(action.step - 1) for action in row[end:]), *row[:end], *ends]
