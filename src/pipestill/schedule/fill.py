"""Fill: a 1F1B student whose bubbles hold the frozen teacher's forwards of this batch and the next.

    rank 0   F0 F1 F2 t1 t2 B0 F3 B1 t3 B2 t0 B3 U     (time runs right; here all work takes equally long)
    rank 1   T3 F0 F1 t0 B0 F2 B1 F3 B2 t1 B3 U  t2    (T: a teacher forward for this step)
    rank 2   T2 T3 F0 B0 F1 B1 F2 B2 F3 B3 U  t0 t1    (t: one for a later step)

A frozen teacher reads no weights that a step changes, so its forwards may run as early as memory allows and the
step stays exact. What bounds a step is then only the work of the most loaded rank and the student's own path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import floor

from pipestill.costs import StageCosts
from pipestill.errors import PlanError
from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.check import never_stuck
from pipestill.schedule.comms import connect
from pipestill.schedule.one_f_one_b import one_f_one_b, stash_bounds, student_order
from pipestill.schedule.program import Schedule, Structure
from pipestill.schedule.simulate import simulate

_ROUNDING = 1e-9


def fill(
    num_stages: int,
    num_microbatches: int,
    *,
    teacher: bool = True,
    costs: StageCosts | None = None,
    run_ahead: int | None = None,
) -> Schedule:
    """The fastest of a family of exact 1F1B + teacher schedules, by simulation under `costs`.

    `run_ahead` bounds the microbatches that the teacher is ahead of the student on a rank, and so the memory of
    waiting teacher outputs (default: as many as it takes). Default costs: every backward twice a forward.
    Raises `PlanError` when no schedule keeps to `run_ahead`.
    """
    ranks = tuple(range(num_stages))
    if costs is None:
        costs = StageCosts(
            forward=(1.0,) * num_stages, backward=(2.0,) * num_stages, update=(0.0,) * num_stages,
            teacher=(1.0,) * num_stages if teacher else (),
        )  # fmt: skip
    given = len(costs.forward), len(costs.teacher)
    if given != (num_stages, num_stages if teacher else given[1]):
        raise PlanError(f"costs are of {given[0]} student and {given[1]} teacher stages, the schedule has {num_stages}")
    structure = Structure(ranks, ranks if teacher else (), num_microbatches)
    orders = [student_order(stage, num_stages, num_microbatches) for stage in ranks]
    stash = stash_bounds(num_stages, num_microbatches)
    if not teacher:
        return connect("fill", structure, orders, stash, run_ahead=0)
    windows = _idle_windows(num_stages, num_microbatches, costs)
    best: tuple[float, int, Schedule] | None = None
    for rows in _candidates(windows, num_microbatches, costs, run_ahead):
        ahead = _run_ahead(rows)
        if run_ahead is not None and ahead > run_ahead:
            continue
        schedule = connect("fill", structure, rows, stash, run_ahead=ahead)
        if not never_stuck(schedule):  # work that takes no time can be packed in an order that no rank can start
            continue
        seconds = round(simulate(schedule, costs).seconds_per_step, 12)
        if best is None or (seconds, ahead) < best[:2]:
            best = (seconds, ahead, schedule)
        if seconds <= windows[0].period * (1 + _ROUNDING):
            break  # as fast as the student's path and the loads allow
    if best is None:
        raise PlanError(f"run_ahead is {run_ahead}; the teacher has to be at least 1 microbatch ahead of the loss")
    return best[2]


def _run_ahead(rows: list[list[Action]]) -> int:
    """The most microbatches that any rank's teacher is ahead of its student, over periods."""
    most = 0
    for row in rows:
        teacher = [a for a in row if a.role is Role.TEACHER]
        num_microbatches = len(teacher)
        done = 0
        for action in row:
            if action.role is Role.TEACHER:
                assert action.microbatch is not None
                most = max(most, action.step * num_microbatches + action.microbatch + 1 - done)
            elif action.op is Op.FORWARD:
                done += 1
    return most


def _candidates(
    windows: list[_Window], num_microbatches: int, costs: StageCosts, run_ahead: int | None
) -> Iterator[list[list[Action]]]:
    """Rows worth timing: packed into the bubbles in a few ways, just ahead of the student's forwards, teacher first."""
    num_stages = len(windows)
    packed = [_packed(windows, num_microbatches, costs, policy) for policy in ("largest", "earliest", "latest")]
    different = [rows for i, rows in enumerate(packed) if rows and rows not in packed[:i]]
    yield from sorted(different, key=_run_ahead)
    inside = {0, num_microbatches, *(2**i for i in range((2 * num_stages + num_microbatches - 1).bit_length()))}
    if run_ahead is not None:
        inside.add(run_ahead - 1)
    for ahead in sorted(inside):
        if ahead >= 0:
            yield _inside(num_stages, num_microbatches, ahead)
    yield [
        [Action(Role.TEACHER, stage, Op.FORWARD, m, 0) for m in range(num_microbatches)]
        + student_order(stage, num_stages, num_microbatches)
        for stage in range(num_stages)
    ]


def _inside(num_stages: int, num_microbatches: int, ahead: int) -> list[list[Action]]:
    """Each teacher forward stands right before the student forward that is `ahead` microbatches earlier."""
    rows = []
    for stage in range(num_stages):
        row = []
        for action in student_order(stage, num_stages, num_microbatches):
            if action.op is Op.FORWARD:
                assert action.microbatch is not None
                step, m = divmod(action.microbatch + ahead, num_microbatches)
                row.append(Action(Role.TEACHER, stage, Op.FORWARD, m, step))
            row.append(action)
        rows.append(row)
    return rows


@dataclass(frozen=True, slots=True)
class _Window:
    """One rank's steady period: its student actions and idle gaps, in absolute seconds, and the period's length."""

    actions: tuple[tuple[float, Action], ...]
    gaps: tuple[tuple[float, float], ...]  # start, length
    period: float
    loss_starts: dict[int, float]


def _idle_windows(num_stages: int, num_microbatches: int, costs: StageCosts) -> list[_Window]:
    """Where each rank idles in the student's steady state, once steps follow each other as fast as the loads allow."""
    alone = one_f_one_b(num_stages, num_microbatches, teacher=False)
    trace = simulate(alone, costs)
    step = trace.steps()[len(trace.steps()) // 2]
    events = [e for e in trace.events if e.action.step == step and e.action.op is not Op.DATA]
    student_period = trace.seconds_per_step
    period = max(student_period, costs.limit_seconds_per_step(num_microbatches))
    losses = {e.action.microbatch: e.start for e in events if e.action.op is Op.LOSS}
    windows = []
    for rank in range(num_stages):
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
        windows.append(_Window(actions, tuple(gaps), period, {m: t for m, t in losses.items() if m is not None}))
    return windows


def _packed(windows: list[_Window], num_microbatches: int, costs: StageCosts, policy: str) -> list[list[Action]]:
    """Teacher forwards in the gaps of every rank, each rank's sequence shifted to meet the needs of the next.

    The teacher's forwards of all steps form one sequence s = step * M + m. A rank runs M of them in every period,
    in order, so its whole placement is M times of day and one shift: slot q runs s = q + shift. The last rank's
    shift is the smallest that has every target ready for its loss; the ranks before follow from it. No rows when links
    are so slow that the teacher would have to be more than two steps ahead a stage.
    """
    slots = [
        _slots(window, num_microbatches, seconds * costs.interference, policy)
        for window, seconds in zip(windows, costs.teacher, strict=True)
    ]
    period = windows[0].period

    def time_of(rank: int, slot: int) -> float:
        day, j = divmod(slot, num_microbatches)
        return slots[rank][j] + day * period

    needed_by = [windows[-1].loss_starts[s] for s in range(num_microbatches)]
    shifts = [0] * len(windows)
    for rank in reversed(range(len(windows))):
        seconds = costs.teacher[rank] * costs.interference
        if rank < len(windows) - 1:
            seconds += costs.link.seconds(costs.teacher_bytes[rank] if costs.teacher_bytes else 0)
        shift = 0
        while any(
            time_of(rank, s - shift) + seconds > needed_by[s] + _ROUNDING * period for s in range(num_microbatches)
        ):
            shift += 1
            if shift > 2 * num_microbatches * (len(windows) + 1):
                return []
        shifts[rank] = shift
        needed_by = [time_of(rank, s - shift) for s in range(num_microbatches)]
    rows = []
    for rank, window in enumerate(windows):
        timed = [(start, 1, i, action) for i, (start, action) in enumerate(window.actions)]
        for j, start in enumerate(slots[rank]):
            step, m = divmod(j + shifts[rank], num_microbatches)
            timed.append((start, 0, j, Action(Role.TEACHER, rank, Op.FORWARD, m, step)))
        rows.append(_up_to_update([action for *_, action in sorted(timed, key=lambda item: item[:3])]))
    return rows


def _up_to_update(row: list[Action]) -> list[Action]:
    """The same endless row with the update right after the last backward, and the period cut there.

    So ranks pass from step to step together, and none has to be told of a batch before it posts for it.
    """
    update = next(action for action in row if action.op is Op.UPDATE)
    row = [action for action in row if action is not update]
    end = 1 + max(i for i, action in enumerate(row) if action.op is Op.BACKWARD)
    return [*(action.at(action.step - 1) for action in row[end:]), *row[:end], update]


def _slots(window: _Window, num_microbatches: int, seconds: float, policy: str) -> list[float]:
    """Start times of M teacher forwards of `seconds` each: as many as fit in each gap, the rest where most is left."""
    room = [[start, length, 0.0] for start, length in window.gaps]  # start, length left, used
    order = sorted(
        range(len(room)),
        key=lambda g: {"largest": -room[g][1], "earliest": room[g][0], "latest": -room[g][0]}[policy],
    )
    starts: list[float] = []
    for g in order:
        start, length, _ = room[g]
        left = num_microbatches - len(starts)
        taken = floor(length / seconds + _ROUNDING) if length < left * seconds else left
        starts += [start + i * seconds for i in range(taken)]
        room[g] = [start, length - taken * seconds, taken * seconds]
    while len(starts) < num_microbatches:
        if room:
            g = max(range(len(room)), key=lambda g: room[g][1])
            starts.append(room[g][0] + room[g][2])
            room[g][1] -= seconds
            room[g][2] += seconds
        else:
            starts.append(window.actions[-1][0])
    return sorted(starts)
