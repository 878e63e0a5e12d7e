"""Packs a frozen teacher's forwards into the idle gaps of a student's timeline."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

from pipestill.costs import StageCosts
from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.pipeline.structure import PipelineStructure
from pipestill.schedule.schedule import Schedule
from pipestill.schedule.simulate import simulate

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Window:
    """One rank's steady period: its student actions and idle gaps, in absolute seconds, and the period's length."""

    actions: tuple[tuple[float, Action], ...]
    gaps: tuple[tuple[float, float], ...]  # start, length
    period: float
    loss_starts: dict[int, float]


def idle_windows(student: Schedule[PipelineStructure], costs: StageCosts, structure: PipelineStructure) -> list[Window]:
    """Where each rank idles in the student's steady state, once steps follow each other as fast as the loads allow."""
    trace = simulate(student, costs)
    step = trace.steps()[len(trace.steps()) // 2]
    events = [e for e in trace.events if e.action.step == step and e.action.op is not Op.DATA]
    limit = costs.limit_seconds_per_step(structure.num_microbatches, structure.teacher_views)
    period = max(trace.seconds_per_step, limit)
    losses = {e.action.microbatch: e.start for e in events if e.action.op is Op.LOSS}
    windows = []
    for rank in range(trace.num_ranks):
        mine = sorted((e for e in events if e.rank == rank), key=lambda e: (e.start, e.end))
        gaps, free = [], mine[0].start
        for event in mine:
            if event.start - free > _ROUNDING * period:
                gaps.append((free, event.start - free))
            free = event.end
        end = mine[0].start + period
        if end - free > _ROUNDING * period:
            gaps.append((free, end - free))
        actions = tuple((e.start, e.action.at(0)) for e in mine)
        windows.append(Window(actions, tuple(gaps), period, {m: t for m, t in losses.items() if m is not None}))
    return windows


def packed(windows: list[Window], structure: PipelineStructure, costs: StageCosts, policy: str) -> list[list[Action]]:
    """Teacher forwards in the gaps of every rank."""
    units, views = structure.num_units(Role.TEACHER), structure.teacher_views
    mean = sum(costs.views[:views]) / views
    timed: list[list[tuple[float, Action | None]]] = []
    for window, seconds in zip(windows, costs.teacher, strict=True):
        slots = _slots(window, units, seconds * mean * costs.interference, policy)
        order = [(start, 1, action) for start, action in window.actions] + [(start, 0, None) for start in slots]
        timed.append([(start, action) for start, _, action in sorted(order, key=lambda item: item[:2])])
    return labelled(timed, structure, costs, windows[0].period)


def labelled(
    timed: list[list[tuple[float, Action | None]]], structure: PipelineStructure, costs: StageCosts, period: float
) -> list[list[Action]]:
    """Rows with start times, where None stands for some forward of a frozen teacher -> which one each of these is.

    The teacher's forwards of all steps form one sequence s = step * units + unit. A rank runs all units of one step in
    every period, in order, so its whole placement is as many times of day and one shift: slot q runs s = q + shift. The
    last rank's shift is the smallest that has every target ready for its loss; the ranks before follow from it. No rows
    when links are so slow that the teacher would have to be more than two steps ahead a stage.
    """
    units, views = structure.num_units(Role.TEACHER), structure.teacher_views
    slots = [[start for start, action in row if action is None] for row in timed]

    def time_of(rank: int, slot: int) -> float:
        day, j = divmod(slot, units)
        return slots[rank][j] + day * period

    needed_by = [0.0] * units
    for start, action in timed[-1]:
        if action is not None and action.op is Op.LOSS and action.microbatch is not None:
            for unit in structure.units_of_loss(action.microbatch, Role.TEACHER):
                needed_by[unit] = start
    shifts = [0] * len(timed)
    for rank in reversed(range(len(timed))):
        seconds = costs.teacher[rank] * max(costs.views[:views]) * costs.interference
        if rank < len(timed) - 1:
            seconds += costs.link.seconds(costs.teacher_bytes[rank] if costs.teacher_bytes else 0)
        shift = 0
        while any(time_of(rank, s - shift) + seconds > needed_by[s] + _ROUNDING * period for s in range(units)):
            shift += 1
            if shift > 2 * units * (len(timed) + 1):
                return []
        shifts[rank] = shift
        needed_by = [time_of(rank, s - shift) for s in range(units)]
    rows = []
    for rank, row in enumerate(timed):
        slot, actions = 0, list[Action]()
        for _, action in row:
            if action is None:
                step, unit = divmod(slot + shifts[rank], units)
                action = Action(Role.TEACHER, rank, Op.FORWARD, unit, step)
                slot += 1
            actions.append(action)
        rows.append(_up_to_update(actions))
    return rows


def _up_to_update(row: list[Action]) -> list[Action]:
    """The same endless row with the update right after the last backward, and the period cut there.

    So ranks pass from step to step together, and none has to be told of a batch before it posts for it.
    """
    ends = [action for action in row if action.op in (Op.NORM, Op.UPDATE)]
    row = [action for action in row if action not in ends]
    end = 1 + max(i for i, action in enumerate(row) if action.op in (Op.BACKWARD, Op.WEIGHT))
    return [*(action.at(action.step - 1) for action in row[end:]), *row[:end], *ends]


def _slots(window: Window, units: int, seconds: float, policy: str) -> list[float]:
    """Start times of teacher forwards of `seconds` each: as many as fit in each gap, the rest where most is left."""
    room = [[start, length, 0.0] for start, length in window.gaps]  # start, length left, used
    order = sorted(
        range(len(room)),
        key=lambda g: {"largest": -room[g][1], "earliest": room[g][0], "latest": -room[g][0]}[policy],
    )
    starts: list[float] = []
    for g in order:
        start, length, _ = room[g]
        left = units - len(starts)
        taken = floor(length / seconds + _ROUNDING) if length < left * seconds else left
        starts += [start + i * seconds for i in range(taken)]
        room[g] = [start, length - taken * seconds, taken * seconds]
    while len(starts) < units:
        if room:
            g = max(range(len(room)), key=lambda g: room[g][1])
            starts.append(room[g][0] + room[g][2])
            room[g][1] -= seconds
            room[g][2] += seconds
        else:
            starts.append(window.actions[-1][0])
    return sorted(starts)
