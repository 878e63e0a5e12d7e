"""List scheduling: every rank does whatever is ready first, by priority, until a pattern repeats.

    first    what other ranks wait for: the end of a step, losses, gradients of inputs, then forwards of the student
    then     what may wait, in the room that is left: gradients of weights and the teacher's forwards

Some steps are played out with the given costs. The order in which a rank did the work of one step in the middle is its row,
if it has settled: that is, if it then did all the work of exactly one period.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipestill.costs import StageCosts
from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.pipeline.structure import PipelineStructure
from pipestill.schedule.pipeline.work import Rows, WorkTable

_STEPS = 12  # that are played
_ROUNDING = 1e-9

_Kind = tuple[Role, Op]
_FORWARD = (Role.STUDENT, Op.FORWARD)
_TEACHER = (Role.TEACHER, Op.FORWARD)


@dataclass(frozen=True, slots=True)
class _Work:
    """One piece of work of a step, with the ends of what it needs."""

    action: Action
    seconds: float
    ends: list[float]
    """When it ended in each step so far."""
    waits: list[tuple[list[float], int, float]]
    """For each result that it needs: the ends of that work, how many steps later it is (0 or less), transfer seconds."""

    def ready(self, step: int) -> float | None:
        """Find when all that the work needs in a step is there; None while some of it has not ended."""
        latest = 0.0
        for ends, later, transfer in self.waits:
            needed = step + later
            if needed < 0:
                continue  # before the first step
            if needed >= len(ends):
                return None
            latest = max(latest, ends[needed] + transfer)
        return latest


@dataclass(slots=True)
class _Rank:
    """What one rank has done so far, and what comes next of each kind of work."""

    queues: dict[_Kind, list[_Work]]
    """All work of one step, by its kind, in order."""
    done: dict[_Kind, int]
    """How many pieces of work of each kind the rank has done, over all steps."""
    order: list[Action] = field(default_factory=list)
    """Everything that the rank has done."""
    free: float = 0.0
    """When its last work ended."""


@dataclass(slots=True)
class Greedy:
    """List scheduling of one structure under given costs; `rows` gives the repeating period.

    Args:
        structure: what a step computes
        costs: seconds of each kind of work on each stage
        stash: for each stage, the most units between forward and backward
        run_ahead: the most units that the teacher may be ahead of the student on a rank
        lead: a teacher's forward that is no more than so many units ahead goes before the student's forwards
        weights_first: whether gradients of weights have priority over the teacher's forwards
    """

    structure: PipelineStructure
    costs: StageCosts
    stash: Sequence[int]
    run_ahead: int
    lead: int = 0
    weights_first: bool = True

    def _ranks(self) -> list[_Rank]:
        """All ranks, with everything to do."""
        table = WorkTable(self.structure, self.costs)
        ends: dict[Action, list[float]] = {action: [] for action in table.seconds}
        ranks = [_Rank({}, {}) for _ in self.structure.student_ranks]
        for action, seconds in table.seconds.items():
            waits = [(ends[wait.result], wait.step, wait.transfer_seconds) for wait in table.waits[action]]
            rank = ranks[self.structure.rank_of(action)]
            rank.queues.setdefault((action.role, action.op), []).append(_Work(action, seconds, ends[action], waits))
            rank.done[action.role, action.op] = 0
        return ranks

    def rows(self) -> Rows | None:
        """One period on each rank, up to what ends a step there; None where no pattern of one step has set in."""
        ranks = self._ranks()
        soon = [0.0]  # moments at which some work ends or some result arrives
        while soon:
            now = heapq.heappop(soon)
            while soon and soon[0] <= now * (1 + _ROUNDING):
                heapq.heappop(soon)
            for stage, rank in enumerate(ranks):
                while rank.free <= now * (1 + _ROUNDING) and self._do_next(stage, rank, now, soon):
                    pass
        rows = []
        for rank in ranks:
            row = _period(rank.order, Op.EMA if self.structure.momentum else Op.UPDATE)
            if row is None:
                return None
            rows.append(row)
        return rows

    def _do_next(self, stage: int, rank: _Rank, now: float, soon: list[float]) -> bool:
        """Do the first work in order of priority that is ready; False where there is none.

        Adds to `soon` when the work ends, or when something arrives that work of a higher priority waits for.
        """
        for kind in self._priorities(rank):
            step, index = divmod(rank.done[kind], len(rank.queues[kind]))
            if step >= _STEPS or not self._allowed(stage, rank, kind, step):
                continue
            work = rank.queues[kind][index]
            ready = work.ready(step)
            if ready is None:
                continue
            if ready > now * (1 + _ROUNDING):
                heapq.heappush(soon, ready)
                continue
            rank.free = now + work.seconds
            rank.order.append(work.action.at(step))
            rank.done[kind] += 1
            work.ends.append(rank.free)
            heapq.heappush(soon, rank.free)
            return True
        return False

    def _priorities(self, rank: _Rank) -> list[_Kind]:
        """The kinds of work in the order in which they are considered."""
        s = self.structure
        first = [
            (Role.STUDENT, Op.GATHER), (Role.STUDENT, Op.NORM), (Role.TEACHER, Op.EMA), (Role.STUDENT, Op.UPDATE),
            (Role.STUDENT, Op.LOSS), (Role.STUDENT, s.backward_ops[0]),
        ]  # fmt: skip
        last = [(Role.STUDENT, Op.WEIGHT)]
        teacher_ahead = s.views * rank.done.get(_TEACHER, 0) - s.teacher_views * rank.done[_FORWARD]
        if teacher_ahead <= self.lead * s.teacher_views:  # the loss will wait for it
            kinds = [*first, _TEACHER, _FORWARD, *last]
        elif self.weights_first:
            kinds = [*first, _FORWARD, *last, _TEACHER]
        else:
            kinds = [*first, _FORWARD, _TEACHER, *last]
        return [kind for kind in kinds if kind in rank.done]

    def _allowed(self, stage: int, rank: _Rank, kind: _Kind, step: int) -> bool:
        """Whether memory and the versions of weights that are still to be read let work of a kind start."""
        s, done = self.structure, rank.done
        role, op = kind
        if op is Op.EMA:
            steps_to_read = min(_STEPS, step + s.staleness + 1)  # whose forwards read the weights as they are
            return done[_TEACHER] >= s.num_units(Role.TEACHER) * steps_to_read
        if role is Role.TEACHER:
            return done[_TEACHER] * s.views < done[_FORWARD] * s.teacher_views + self.run_ahead * s.views
        if op is Op.FORWARD:
            return done[_FORWARD] - done[Role.STUDENT, s.backward_ops[-1]] < self.stash[stage]
        return True


def _period(order: list[Action], last: Op) -> list[Action] | None:
    """The period of a rank's order, from one `last` of a step to the next, in the middle; None where there is none."""
    ends = [i + 1 for i, action in enumerate(order) if action.op is last]
    if len(ends) < _STEPS:
        return None
    step = _STEPS // 2
    period = order[ends[step - 1] : ends[step]]
    if any(action.step < step for action in period):
        return None
    row = [action.at(action.step - step) for action in period]
    each_once = len({action.at(0) for action in row}) == len(row) and len(row) * _STEPS == len(order)
    return row if each_once else None
