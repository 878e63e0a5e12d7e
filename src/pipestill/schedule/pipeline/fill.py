"""Fill: a pipelined student whose bubbles hold the teacher's forwards, of this batch and the next.

    rank 0   F0 F1 F2 t1 t2 B0 F3 B1 t3 B2 t0 B3 U     (time runs right; here all work takes equally long)
    rank 1   T3 F0 F1 t0 B0 F2 B1 F3 B2 t1 B3 U  t2    (T: a teacher forward for this step)
    rank 2   T2 T3 F0 B0 F1 B1 F2 B2 F3 B3 U  t0 t1    (t: one for a later step)

A frozen teacher reads no weights that a step changes, so its forwards may run as early as memory allows and the
step stays exact. What bounds a step is then only the work of the most loaded rank and the student's own path.
A momentum teacher of a stage may start a batch once that stage's own update is done, or one step earlier with staleness 1.
Gradients of weights, where backwards are split, are what else may wait for a bubble (Qi et al., Zero Bubble, 2023).

No rule gives the best order for all costs, so several are tried, until one reaches what theory allows:
1. `candidates` writes rows by simple rules;
2. `weave` puts what may wait into the student's order, for a given period;
3. `improve` moves it about in the best rows so far.
A fast `clock` times them all. The fastest few are connected, proved and simulated, and the fastest of these is the schedule.
"""

from math import ceil, inf
from typing import Any, NamedTuple

from pipestill.costs import StageCosts
from pipestill.errors import PlanError
from pipestill.schedule.action import Role
from pipestill.schedule.check import examine
from pipestill.schedule.comms import connect
from pipestill.schedule.deadlock import never_stuck
from pipestill.schedule.pipeline.candidates import Candidates
from pipestill.schedule.pipeline.clock import Clock
from pipestill.schedule.pipeline.improve import improve
from pipestill.schedule.pipeline.one_f_one_b import least_stash
from pipestill.schedule.pipeline.structure import PipelineStructure, pipeline
from pipestill.schedule.pipeline.weave import weave
from pipestill.schedule.pipeline.work import Rows, most_ahead
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
    """Find the fastest of many schedules that keep the declared staleness, by simulation under `costs`.

    Args:
        num_stages: stages of each model; stage i of both is on rank i
        num_microbatches: slices of a batch
        teacher: whether there is one
        costs: seconds of each kind of work on each stage (default: every backward takes as long as two forwards)
        stash: most microbatches that a rank holds from forward to backward: a number, or "n" (as many as 1F1B needs, the
            default for whole backwards), "2n-1" (the default for split ones) or "all"
        run_ahead: most units that the teacher is ahead of the student on a rank, which bounds the memory of waiting teacher
            outputs (default: as many as it takes)
        work: further fields of the `PipelineStructure`

    Raises:
        PlanError: no schedule keeps to `stash` or `run_ahead`, or the costs are of other stages or views
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
    found = _Search(structure, costs, stash_units(stash, structure), run_ahead if teacher else None).fastest()
    if found is None:
        least = structure.num_units(Role.TEACHER) if structure.staleness else 1
        raise PlanError(f"run_ahead is {run_ahead}; the teacher has to be at least {least} ahead (leave it out)")
    return found


def stash_units(stash: int | str | None, structure: PipelineStructure) -> int:
    """The bound on units (passes of a microbatch in one view) that the knob `stash` means.

    Raises `PlanError` for a word that there is not, and where a step needs more.
    """
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


class _Found(NamedTuple):
    """Rows that can run, or a schedule that is proved."""

    seconds: float
    """The seconds of a step: the clock's for a candidate's rows, the simulator's for a schedule."""
    ahead: int
    """How many units the teacher is ahead at most."""
    rows: Rows
    schedule: Schedule[PipelineStructure] | None = None


class _Search:
    """One search for the fastest schedule of a structure under given costs."""

    def __init__(self, structure: PipelineStructure, costs: StageCosts, stash: int, run_ahead: int | None) -> None:
        self.structure = structure
        self.costs = costs
        self.run_ahead = inf if run_ahead is None else run_ahead
        self.candidates = Candidates(structure, costs, stash, run_ahead)
        self.clock = Clock(structure, costs)
        self.timed: list[_Found] = []  # the fastest first
        self.tried: list[Rows] = []  # that were proved, or could not be
        self.best: _Found | None = None
        self.goal = self._shortest_period() * (1 + _ROUNDING)
        """Seconds of a step that end the search."""

    def _shortest_period(self) -> float:
        """The seconds of a step that loads, the student's own path and theory allow.

        With equal stages theory is exact (see docs/filling.md). With others it is where further search does not pay.
        """
        s, costs = self.structure, self.costs
        load = costs.limit_seconds_per_step(s.num_microbatches, s.teacher_views) if s.teacher_ranks else 0.0
        if s.momentum and not s.staleness:
            # A momentum teacher's forwards cannot fill the ramp: each hop of it shows, but for two gradients of weights
            # that may wait where backwards are split, and three with a stash of 2n-1.
            hidden = 0.0
            if s.split:
                ample = self.candidates.stash[0] >= least_stash(s) + s.last
                hidden = min(costs.weight, default=0.0) * (3 if ample else 2)
            load += s.last * max(0.0, max(min(costs.teacher), min(costs.forward)) + min(costs.backward) - hidden)
        return load if s.split else max(load, self.candidates.student_alone.seconds_per_step)

    def fastest(self) -> Schedule[PipelineStructure] | None:
        """The fastest valid schedule that is found, among equals the one whose teacher is the least ahead.

        None where none keeps to `run_ahead`.
        """
        if not self.structure.staleness:  # so that no search ends slower than that
            self._prove(self.candidates.plain())
            if self.best is not None:
                self.goal = min(self.goal, self.best.seconds * (1 + _ROUNDING))
        if not self._try_candidates():
            if self.candidates.num_actions <= _MOST_WOVEN:
                self._try_weaving()
                self._try_local_search()
            self._prove_fastest()
        return None if self.best is None else self.best.schedule

    def _try_candidates(self) -> bool:
        """Time all candidates; whether one that reaches the goal is proved."""
        for rows in self.candidates.all(few=self.candidates.num_actions > _MOST_WOVEN):
            self._time(rows)
            if self.timed and self.timed[0].rows is rows and self.timed[0].seconds <= self.goal:
                self._prove(rows)
                if self._is_reached():
                    return True
        return False

    def _try_weaving(self) -> None:
        """Weave rows for the shortest period, or one that is a little longer, for which that comes out."""
        for stretch in _STRETCHES:
            period = self.goal * stretch
            if self.timed and self.timed[0].seconds <= period:
                continue
            for latest in (True, False) if self.structure.momentum else (False,):
                rows = weave(self.candidates, period, latest)
                if rows is not None:
                    self._time(rows)
                    return

    def _try_local_search(self) -> None:
        """Improve the fastest rows so far, where they do not reach the goal."""
        if self.timed and self.goal < self.timed[0].seconds:
            s = self.structure
            most_steps = 1 + s.staleness if s.momentum else 2 * len(s.student_ranks) + 2
            tries = _MOVES // self.candidates.num_actions
            self._time(improve(self.timed[0].rows, self.clock, self.goal, tries, most_steps))

    def _prove_fastest(self) -> None:
        """Prove the fastest rows in turn, until one reaches the goal or a few were tried."""
        enough = 1 if self.candidates.num_actions > _MOST_WOVEN else _VALIDATED
        for tried, timed in enumerate(self.timed, start=1):
            self._prove(timed.rows)
            if self._is_reached() or (self.best is not None and tried >= enough):
                break

    def _is_reached(self) -> bool:
        """Whether the best schedule reaches the goal."""
        return self.best is not None and self.best.seconds <= self.goal

    def _time(self, rows: Rows) -> None:
        """Add rows to those that are timed, if they keep to `run_ahead` and can run."""
        ahead = most_ahead(rows, self.structure)
        if ahead <= self.run_ahead:
            period = self.clock.period(rows)
            if period is not None:
                self.timed.append(_Found(round(period, 12), ahead, rows))
                self.timed.sort(key=lambda found: found[:2])

    def _prove(self, rows: Rows) -> None:
        """Make the schedule of `rows` the best one, if it is valid and faster."""
        ahead = most_ahead(rows, self.structure)
        if ahead > self.run_ahead or rows in self.tried:
            return
        self.tried.append(rows)
        schedule = connect("fill", self.structure, rows, self.candidates.stash, run_ahead=ahead)
        # Work that takes no time can be packed in an order that no rank can start, or that reads other weights.
        if not never_stuck(schedule) or examine(schedule).problems:
            return
        seconds = round(simulate(schedule, self.costs).seconds_per_step, 12)
        if self.best is None or (seconds, ahead) < self.best[:2]:
            self.best = _Found(seconds, ahead, rows, schedule)
