"""Fill: a pipelined student whose bubbles hold the teacher's forwards, of this batch and the next.

    rank 0   F0 F1 F2 t1 t2 B0 F3 B1 t3 B2 t0 B3 U     (time runs right; here all work takes equally long)
    rank 1   T3 F0 F1 t0 B0 F2 B1 F3 B2 t1 B3 U  t2    (T: a teacher forward for this step)
    rank 2   T2 T3 F0 B0 F1 B1 F2 B2 F3 B3 U  t0 t1    (t: one for a later step)

A frozen teacher reads no weights that a step changes, so its forwards may run as early as memory allows and the
step stays exact. What bounds a step is then only the work of the most loaded rank and the student's own path.
A momentum teacher of a stage may start a batch once that stage's own update is done, or one step earlier with staleness 1.
Gradients of weights, where backwards are split, are what else may wait for a bubble (Qi et al., Zero Bubble, 2023).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

from pipestill.costs import StageCosts
from pipestill.errors import PlanError
from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.check import examine
from pipestill.schedule.comms import connect
from pipestill.schedule.deadlock import never_stuck
from pipestill.schedule.pipeline.clock import Clock
from pipestill.schedule.pipeline.greedy import Greedy
from pipestill.schedule.pipeline.improve import improve
from pipestill.schedule.pipeline.one_f_one_b import least_stash, student_order, teacher_order, warm_up
from pipestill.schedule.pipeline.pack import idle_windows, labelled, packed
from pipestill.schedule.pipeline.structure import PipelineStructure, pipeline
from pipestill.schedule.pipeline.weave import Edge, Weaver, in_order, stash_bounds
from pipestill.schedule.schedule import Schedule
from pipestill.schedule.simulate import simulate

_ROUNDING = 1e-9
_MOST_WOVEN = 700  # actions of a period; weaving takes time that grows with their cube
_STRETCHES = (1.0, 1.03, 1.1)  # of the shortest period, tried in turn
_VALIDATED = 3  # of the fastest, how many are proved and simulated
_MOVES = 200_000  # of the local search, times actions in a period: less than a second


def fill(
    num_stages: int,
    num_microbatches: int,
    *,
    teacher: bool = True,
    costs: StageCosts | None = None,
    stash: int | str | None = None,
    run_ahead: int | None = None,
    **work: Any,
) -> Schedule[PipelineStructure]:
    """The fastest of a family of schedules that keep the declared staleness, by simulation under `costs`.

    `stash` bounds the student's units that a rank holds: a number of microbatches, or "n" (as many as 1F1B needs, the
    default for whole backwards), "2n-1" (the default for split ones) or "all". `run_ahead` bounds the units that the
    teacher is ahead of the student on a rank, and so the memory of waiting teacher outputs (default: as many as it takes).
    Default costs: every backward twice a forward. `work`: fields of the `PipelineStructure`. Raises `PlanError` when no schedule
    keeps to `stash` or `run_ahead`.
    """
    structure = pipeline(num_stages, num_microbatches, teacher=teacher, **work)
    if costs is None:
        ones = (1.0,) * num_stages
        costs = StageCosts(
            forward=ones, backward=(2.0,) * num_stages, update=(0.0,) * num_stages, teacher=ones if teacher else (),
            weight=ones, views=(1.0,) * structure.views,
        )  # fmt: skip
    if len(costs.views) != structure.views:
        raise PlanError(f"costs are of {len(costs.views)} views, the schedule has {structure.views}")
    given = len(costs.forward), len(costs.teacher)
    if given != (num_stages, num_stages if teacher else given[1]):
        raise PlanError(f"costs are of {given[0]} student and {given[1]} teacher stages, the schedule has {num_stages}")
    best = _Family(structure, costs, stash_units(stash, structure), run_ahead if teacher else None).search()
    if best is None:
        least = structure.num_units(Role.TEACHER) if structure.staleness else 1
        raise PlanError(f"run_ahead is {run_ahead}; the teacher has to be at least {least} ahead (leave it out)")
    return best


def stash_units(stash: int | str | None, structure: PipelineStructure) -> int:
    """The bound on units that a knob `stash` means; `PlanError` when a step needs more."""
    n, units = len(structure.student_ranks), structure.num_units(Role.STUDENT)
    least = least_stash(structure)
    if stash is None:
        stash = "2n-1" if structure.split else "n"
    named = {"n": least, "2n-1": min(units, least + n - 1), "all": units}
    if isinstance(stash, str):
        if stash not in named:
            raise PlanError(f"stash is '{stash}'; expected a number of microbatches, or n, 2n-1 or all")
        return named[stash]
    wanted = stash * structure.views
    if wanted < least:
        what = "whole batch that its loss takes" if structure.batch_loss else f"{n} stages"
        raise PlanError(
            f"stash is {stash} microbatches; the pipeline holds at least {ceil(least / structure.views)} "
            f"for its {what} (--stash n)"
        )
    return min(units, wanted)


@dataclass(frozen=True)
class _Found:
    """A valid schedule and what it is chosen by."""

    seconds: float
    ahead: int
    schedule: Schedule[PipelineStructure]
    rows: list[list[Action]]


class _Family:
    """The schedules that are tried for one structure under given costs."""

    def __init__(self, structure: PipelineStructure, costs: StageCosts, stash: int, run_ahead: int | None) -> None:
        self.structure, self.costs, self.run_ahead = structure, costs, run_ahead
        ranks = range(len(structure.student_ranks))
        self.ahead = warm_up(structure, stash)
        self.stash = (stash,) * len(ranks) if structure.split else self.ahead
        self.orders = [student_order(stage, structure, self.ahead[stage]) for stage in ranks]
        self.clock = Clock(structure, costs)
        self.alone = dataclasses.replace(
            structure, teacher_ranks=(), momentum=False, staleness=0, student_staleness=0, split=False
        )
        whole = [student_order(stage, self.alone, self.ahead[stage]) for stage in ranks]
        self.student = connect("student", self.alone, whole, self.ahead, run_ahead=0)
        self.student_period = 0.0 if structure.split else simulate(self.student, costs).seconds_per_step

    def search(self) -> Schedule[PipelineStructure] | None:
        """The fastest valid schedule that is found, among equals the one whose teacher is the least ahead; None where
        none keeps to `run_ahead`.
        """
        s = self.structure
        size = self._size
        best = None if s.staleness else self.better(None, self._plain())  # so that no search ends slower than that
        goal = self._goal()
        if best is not None:
            goal = min(goal, best.seconds * (1 + _ROUNDING))
        timed: list[tuple[float, list[list[Action]]]] = []
        for rows in self.candidates():
            self._time(rows, timed)
            if timed and timed[0][0] <= goal and timed[0][1] is rows:
                best = self.better(best, rows)
                if best is not None and best.seconds <= goal:
                    return best.schedule
        for stretch in _STRETCHES if size <= _MOST_WOVEN else ():
            if not timed or goal * stretch < timed[0][0]:
                ways = (self._woven(goal * stretch, latest) for latest in ((True, False) if s.momentum else (False,)))
                woven = next((rows for rows in ways if rows is not None), None)
                if woven is not None:
                    self._time(woven, timed)
                    break
        if timed and goal < timed[0][0] and size <= _MOST_WOVEN:
            furthest = 1 + s.staleness if s.momentum else 2 * len(self.orders) + 2
            self._time(improve(timed[0][1], self.clock, goal, _MOVES // size, furthest), timed)
        for tried, (_, rows) in enumerate(timed, 1):
            best = self.better(best, rows)
            if best is not None and (tried >= _VALIDATED or best.seconds <= goal or size > _MOST_WOVEN):
                break
        return None if best is None else best.schedule

    @property
    def _size(self) -> int:
        """Actions in a period."""
        s = self.structure
        flexible = s.num_units(Role.TEACHER) * bool(s.teacher_ranks) + s.num_units(Role.STUDENT) * s.split
        return sum(map(len, self.orders)) + len(self.orders) * flexible

    def _time(self, rows: list[list[Action]], timed: list[tuple[float, list[list[Action]]]]) -> None:
        """Add rows to those that are worth a look, the fastest first, if they keep to `run_ahead` and can run."""
        if self.run_ahead is not None and _run_ahead(rows, self.structure) > self.run_ahead:
            return
        period = self.clock.period(rows)
        if period is not None:
            timed.append((round(period, 12), rows))
            timed.sort(key=lambda item: (item[0], _run_ahead(item[1], self.structure)))

    def _goal(self) -> float:
        """A period that is worth no further search: what the loads, the student's path and theory allow.

        With equal stages theory is exact (PAPERS.md, section 3); with others this is where the search is cut off.
        """
        s, costs = self.structure, self.costs
        limit = costs.limit_seconds_per_step(s.num_microbatches, s.teacher_views) if s.teacher_ranks else 0.0
        if s.momentum and not s.staleness:
            weight = min(costs.weight, default=0.0) if s.split else 0.0
            ample = self.stash[0] >= least_stash(s) + s.last
            hop = max(min(costs.teacher), min(costs.forward)) + min(costs.backward) - weight * (3 if ample else 2)
            limit += s.last * max(0.0, hop)
        return max(limit, self.student_period) * (1 + _ROUNDING)

    def better(self, best: _Found | None, rows: list[list[Action]] | None) -> _Found | None:
        """The faster of `best` and the schedule of `rows`, if that is one at all."""
        ahead = _run_ahead(rows, self.structure) if rows else 0
        if rows is None or (self.run_ahead is not None and ahead > self.run_ahead):
            return best
        schedule = connect("fill", self.structure, rows, self.stash, run_ahead=ahead)
        # Work that takes no time can be packed in an order that no rank can start, or that reads other weights.
        if not never_stuck(schedule) or examine(schedule).problems:
            return best
        seconds = round(simulate(schedule, self.costs).seconds_per_step, 12)
        if best is None or (seconds, ahead) < (best.seconds, best.ahead):
            return _Found(seconds, ahead, schedule, rows)
        return best

    def candidates(self) -> Iterator[list[list[Action]]]:
        """Rows worth timing: packed into the bubbles in a few ways, by list scheduling, just ahead of the student's
        forwards, and teacher first. Each is a period that ends with what ends a step.
        """
        s = self.structure
        if s.teacher_ranks and not s.momentum and not s.split:
            windows = idle_windows(self.student, self.costs, s)
            ways = [packed(windows, s, self.costs, policy) for policy in ("largest", "earliest", "latest")]
            different = [rows for i, rows in enumerate(ways) if rows and rows not in ways[:i]]
            yield from sorted(different, key=lambda rows: _run_ahead(rows, s))
        if s.split or s.momentum:
            yield from self._greedy()
        if not s.teacher_ranks:
            yield self._plain()
            return
        units = s.num_units(Role.TEACHER)
        inside = {0, units, *(2**i for i in range((2 * len(self.orders) + units - 1).bit_length()))}
        if self.run_ahead is not None:
            inside.add(self.run_ahead - 1)
        for ahead in sorted(inside):
            if ahead >= 0:
                yield self._with_weights(self._inside(ahead))
        if not s.staleness:
            yield self._plain()

    def _plain(self) -> list[list[Action]]:
        """The teacher first."""
        s = self.structure
        return self._with_weights([teacher_order(stage, s) + order for stage, order in enumerate(self.orders)])

    def _greedy(self) -> Iterator[list[list[Action]]]:
        """By list scheduling; one way only where a period is so long that each takes seconds."""
        units = self.structure.num_units(Role.TEACHER)
        most = units + len(self.orders) if self.run_ahead is None else self.run_ahead
        ways = [
            (lead, ahead, weights_first)
            for lead, ahead in ((0, most), (1, most), (0, 2 * units))
            for weights_first in ((True, False) if self.structure.split else (True,))
            if self.run_ahead is None or ahead <= self.run_ahead
        ]
        for lead, ahead, weights_first in ways[: 1 if self._size > _MOST_WOVEN else None]:
            rows = Greedy(self.structure, self.costs, self.stash, ahead, lead, weights_first).rows()
            if rows is not None:
                yield rows

    def _with_weights(self, rows: list[list[Action]]) -> list[list[Action]]:
        """Each gradient of weights right after that of the input, where backwards are split."""
        if not self.structure.split:
            return rows
        return [
            [b for a in row for b in ([a, dataclasses.replace(a, op=Op.WEIGHT)] if a.op is Op.INPUT else [a])]
            for row in rows
        ]

    def _inside(self, ahead: int) -> list[list[Action]]:
        """Each teacher forward stands right before the student forward of its microbatch, `ahead` units earlier.

        A momentum teacher's forwards for a later step stand after their weights' update.
        """
        structure = self.structure
        units, views = structure.num_units(Role.TEACHER), structure.teacher_views
        rows = []
        for stage, order in enumerate(self.orders):
            row, late = list[Action](), list[Action]()
            for action in order:
                if action.op is Op.FORWARD:
                    assert action.microbatch is not None
                    m, view = divmod(action.microbatch, structure.views)
                    if view < views:
                        step, unit = divmod(m * views + view + ahead, units)
                        forward = Action(Role.TEACHER, stage, Op.FORWARD, unit, step)
                        early = structure.momentum and step > structure.staleness
                        (late if early else row).append(forward)
                row.append(action)
            rows.append([*row, *late])
        return rows

    def _woven(self, period: float, latest: bool) -> list[list[Action]] | None:
        """Rows woven for a period; None where that does not come out. `latest`: see `Weaver.insert`."""
        s = self.structure
        stages = range(len(self.orders))
        weights = [self._flexible(Role.STUDENT, stage, Op.WEIGHT) for stage in stages if s.split]
        taught = [self._flexible(Role.TEACHER, stage, Op.FORWARD) for stage in stages if s.teacher_ranks]
        bounds = [edge for group in weights for edge in in_order(group)]
        for stage in stages:
            if s.split:
                bounds += stash_bounds(s, stage, self.stash[stage])
            if s.momentum:
                bounds += [*self._teacher_bounds(stage), *in_order(taught[stage])]
        flexible = [action for group in (*weights, *taught) for action in group]
        orders = [[action for action in order if action.op is not Op.EMA] for order in self.orders]
        weaver = Weaver(s, self.costs, orders, flexible, period, bounds)
        todo = [(a, 0) for group in weights for a in reversed(group)]
        if s.momentum or not s.teacher_ranks:
            todo += [(a, 1 + s.staleness) for group in reversed(taught) for a in reversed(group)]
            fits = weaver.feasible and all(weaver.insert(action, most, latest) for action, most in todo)
            return weaver.result() if fits else None
        # A frozen teacher's forwards may be of any step: where they stand is chosen first, and then which they are.
        todo += [(a, 0) for group in taught for a in group]
        if not (weaver.feasible and all(weaver.insert(action, most, latest) for action, most in todo)):
            return None
        timed = [
            [(start, None if action.role is Role.TEACHER else action) for start, action in row]
            for row in weaver.timed()
        ]
        return labelled(timed, s, self.costs, period) or None

    def _flexible(self, role: Role, stage: int, op: Op) -> list[Action]:
        return [Action(role, stage, op, u, 0) for u in range(self.structure.num_units(role))]

    def _teacher_bounds(self, stage: int) -> list[Edge]:
        """A momentum teacher starts a batch after the update before; `run_ahead` bounds how far it may be ahead."""
        s = self.structure
        trained = s.num_units(Role.STUDENT)
        updates = Action(Role.STUDENT, stage, Op.UPDATE, None, 0)
        bounds: list[Edge] = []
        for unit, forward in enumerate(self._flexible(Role.TEACHER, stage, Op.FORWARD)):
            bounds.append((updates, forward, 1 + s.staleness))
            if self.run_ahead is not None:
                done = ceil((unit + 1 - self.run_ahead) * s.views / s.teacher_views) - 1
                step, of_student = divmod(done, trained)
                bounds.append((Action(Role.STUDENT, stage, Op.FORWARD, of_student, 0), forward, -step))
        return bounds


def _run_ahead(rows: list[list[Action]], structure: PipelineStructure) -> int:
    """The most units that any rank's teacher is ahead of its student, over periods."""
    most = 0
    units = structure.num_units(Role.TEACHER)
    for row in rows:
        done = 0
        for action in row:
            if action.op is Op.FORWARD and action.role is Role.TEACHER:
                assert action.microbatch is not None
                ahead = (action.step * units + action.microbatch + 1) * structure.views - done * structure.teacher_views
                most = max(most, ceil(ahead / structure.views))
            elif action.op is Op.FORWARD:
                done += 1
    return most
