"""List scheduling: every rank does whatever is ready first, by priority, until a pattern repeats.

What the student's next rank waits for comes first (gradients of inputs, then forwards), then what may wait: gradients of
weights and the teacher's forwards, which take whatever room is left.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from pipestill.costs import StageCosts
from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.needs import needs
from pipestill.schedule.pipeline.costs import action_seconds, transfer_seconds
from pipestill.schedule.pipeline.structure import PipelineStructure

_STEPS = 12
_ROUNDING = 1e-9


class Greedy:
    """`rows()` gives the repeating period, or None where no pattern of one step has set in.

    `stash` bounds each stage's units between forward and backward, `run_ahead` the units that the teacher is ahead of the
    student; one that is no more than `lead` ahead goes before the student's forwards. `weights_first`: whether gradients of
    weights have priority over the teacher's forwards.
    """

    def __init__(
        self,
        structure: PipelineStructure,
        costs: StageCosts,
        stash: Sequence[int],
        run_ahead: int,
        lead: int = 0,
        weights_first: bool = True,
    ) -> None:
        self.structure, self.costs, self.stash, self.run_ahead = structure, costs, stash, run_ahead
        self.lead, self.weights_first = lead, weights_first
        self.num_ranks = len(structure.student_ranks)
        self.taught = structure.num_units(Role.TEACHER)
        self.seconds = {a: action_seconds(a, structure, costs) * costs.interference for a in structure.actions()}
        self.done: dict[Action, float] = {}
        self.awaited: dict[Action, list[tuple[Action, float]]] = {}
        self.orders: list[list[Action]] = [[] for _ in range(self.num_ranks)]
        self.next = [dict.fromkeys(self._kinds(rank), 0) for rank in range(self.num_ranks)]
        self.free = [0.0] * self.num_ranks

    def _kinds(self, rank: int) -> list[tuple[Role, Op]]:
        ops = [Op.FORWARD, *self.structure.backward_ops, Op.UPDATE]
        kinds = [(Role.STUDENT, op) for op in ops]
        if rank == self.structure.last:
            kinds.append((Role.STUDENT, Op.LOSS))
        if self.structure.clip:
            kinds.append((Role.STUDENT, Op.NORM))
        if self.structure.momentum:
            kinds.append((Role.TEACHER, Op.EMA))
        return [*kinds, (Role.TEACHER, Op.FORWARD)] if self.structure.teacher_ranks else kinds

    def rows(self) -> list[list[Action]] | None:
        """One period a rank, up to what ends a step there."""
        now, soon = 0.0, [0.0]
        while soon:
            now = heapq.heappop(soon)
            while soon and soon[0] <= now * (1 + _ROUNDING):
                heapq.heappop(soon)
            for rank in range(self.num_ranks):
                while (
                    self.free[rank] <= now * (1 + _ROUNDING) and (action := self._choose(rank, now, soon)) is not None
                ):
                    self._do(rank, action, now, soon)
        return self._period()

    def _do(self, rank: int, action: Action, now: float, soon: list[float]) -> None:
        now += self.seconds[action.at(0)]
        self.done[action] = now
        self.orders[rank].append(action)
        self.next[rank][action.role, action.op] += 1
        self.free[rank] = now
        heapq.heappush(soon, now)

    def _candidate(self, rank: int, kind: tuple[Role, Op]) -> Action | None:
        """The next work of its kind on a rank, in a run of some steps."""
        role, op = kind
        count = self.next[rank][kind]
        if not op.per_microbatch:
            unit, step = None, count
        else:
            per_step = self.structure.num_losses if op is Op.LOSS else self.structure.num_units(role)
            step, unit = divmod(count, per_step)
        return Action(role, rank, op, unit, step) if step < _STEPS else None

    def _choose(self, rank: int, now: float, soon: list[float]) -> Action | None:
        """What to start now. Notes in `soon` when something that is on its way will be there."""
        for kind in self._priorities(rank):
            action = self._candidate(rank, kind)
            if action is None or not self._allowed(rank, action):
                continue
            ready = self._ready(rank, action)
            if ready is None:
                continue
            if ready <= now * (1 + _ROUNDING):
                return action
            heapq.heappush(soon, ready)
        return None

    def _priorities(self, rank: int) -> list[tuple[Role, Op]]:
        s, done = self.structure, self.next[rank]
        forward, teacher = (Role.STUDENT, Op.FORWARD), (Role.TEACHER, Op.FORWARD)
        kinds = [
            (Role.STUDENT, Op.NORM), (Role.TEACHER, Op.EMA), (Role.STUDENT, Op.UPDATE), (Role.STUDENT, Op.LOSS),
            (Role.STUDENT, s.backward_ops[0]), forward,
        ]  # fmt: skip
        kinds = [kind for kind in kinds if kind in done]
        rest = [(Role.STUDENT, Op.WEIGHT)] if s.split else []
        if teacher in done:
            if done[teacher] * s.views <= (done[forward] + self.lead) * s.teacher_views:
                kinds.insert(kinds.index(forward), teacher)  # the loss will wait for it
            else:
                rest.insert(len(rest) if self.weights_first else 0, teacher)
        return kinds + rest

    def _allowed(self, rank: int, action: Action) -> bool:
        """Whether memory and the versions of weights that are still to be read let it start."""
        s, done = self.structure, self.next[rank]
        forwards = done[Role.STUDENT, Op.FORWARD]
        if action.op is Op.EMA:
            return done[Role.TEACHER, Op.FORWARD] >= self.taught * min(_STEPS, action.step + s.staleness + 1)
        if action.role is Role.TEACHER:
            assert action.microbatch is not None
            return done[action.role, action.op] * s.views < forwards * s.teacher_views + self.run_ahead * s.views
        if action.op is Op.FORWARD:
            return forwards - done[Role.STUDENT, s.backward_ops[-1]] < self.stash[rank]
        return True

    def _ready(self, rank: int, action: Action) -> float | None:
        """When all that an action needs is there; None while some of it is not done."""
        latest = 0.0
        for need, transfer in self._awaited(rank, action):
            end = self.done.get(need)
            if end is None:
                return None
            latest = max(latest, end + transfer)
        return latest

    def _awaited(self, rank: int, action: Action) -> list[tuple[Action, float]]:
        """What it needs, each with the seconds in which it comes; looked up once, because it is asked again and again."""
        if action not in self.awaited:
            self.awaited[action] = [
                (
                    need,
                    transfer_seconds(need, self.structure, self.costs) if self.structure.rank_of(need) != rank else 0.0,
                )
                for need in needs(action, self.structure)
                if need.step >= 0 and need.op is not Op.DATA
            ]
        return self.awaited[action]

    def _period(self) -> list[list[Action]] | None:
        rows = []
        for order in self.orders:
            last = Op.EMA if self.structure.momentum else Op.UPDATE
            ends = [i + 1 for i, a in enumerate(order) if a.op is last]
            middle = len(ends) // 2
            if len(ends) < _STEPS:
                return None
            cut = order[ends[middle - 1] : ends[middle]]
            if any(a.step < middle for a in cut):
                return None
            row = [a.at(a.step - middle) for a in cut]
            if len({a.at(0) for a in row}) != len(row) or len(row) * _STEPS != len(order):
                return None
            rows.append(row)
        return rows
