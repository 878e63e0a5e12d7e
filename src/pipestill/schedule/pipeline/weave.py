"""Weaves flexible work into fixed orders, so that a given period is kept where it can be.

A frozen teacher's forwards are just so much work here, which of them stands where is settled afterwards.

Every rank repeats a fixed order of work; flexible work (teacher forwards, gradients of weights) may stand anywhere in it
that its needs allow, also in the period before. A start time for every work, counted in its own step, has to satisfy
start(v) >= start(u) + seconds(u) - w * period wherever v waits for u of w steps before: in needs, in memory bounds, and for
neighbours on a rank. So what room there is between two neighbours is told by the longest way back from the second
to the first. `distance[u, v]` holds all these longest ways; each insertion takes the place with the most room and
brings them up to date. (Insertion heuristics with exact slack, as in job-shop scheduling; the cyclic form is that of
modulo scheduling, Rau 1994.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from pipestill.costs import StageCosts
from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.needs import needs
from pipestill.schedule.pipeline.costs import action_seconds, transfer_seconds
from pipestill.schedule.pipeline.structure import PipelineStructure

_ROUNDING = 1e-9
Edge = tuple[Action, Action, int]
"""v (second) waits for u (first) of that many steps before."""


class Weaver:
    """The rows of one period, growing. `feasible` tells whether the fixed orders alone keep the period."""

    def __init__(
        self,
        structure: PipelineStructure,
        costs: StageCosts,
        orders: Sequence[Sequence[Action]],
        flexible: Iterable[Action],
        period: float,
        bounds: Iterable[Edge],
    ) -> None:
        self.structure, self.period = structure, period
        fixed = [action for order in orders for action in order]
        nodes = [*fixed, *flexible]
        self.number = {action: i for i, action in enumerate(nodes)}
        self.seconds = np.array([action_seconds(a, structure, costs) for a in nodes]) * costs.interference
        self.before: list[list[tuple[int, float]]] = [[] for _ in nodes]  # of each node: who, and by how much earlier
        self.after: list[list[tuple[int, float]]] = [[] for _ in nodes]
        for action in nodes:
            free = action.role is Role.TEACHER and not structure.momentum
            for need in needs(action, structure):
                taught = need.role is Role.TEACHER and not structure.momentum
                if need.at(0) in self.number and not free and not taught:
                    far = structure.rank_of(need) != structure.rank_of(action)
                    self._wait(need.at(0), action, -need.step, transfer_seconds(need, structure, costs) if far else 0.0)
        for first, second, lag in bounds:
            if first in self.number and second in self.number:
                self._wait(first, second, lag)
        self.rows = [[(self.number[action], 0) for action in order] for order in orders]  # node, steps ahead
        self.ends = [action.op in (Op.NORM, Op.UPDATE) for action in nodes]
        self.placed = np.zeros(len(nodes), dtype=bool)
        self.distance = np.full((len(nodes), len(nodes)), -np.inf)
        np.fill_diagonal(self.distance, 0.0)
        self.placed[: len(fixed)] = True
        for node in range(len(fixed)):
            for other, weight in self.before[node]:
                if self.placed[other]:
                    self.distance[other, node] = max(self.distance[other, node], weight)
        for row in self.rows:
            for (one, ahead), (other, its) in zip(row, [*row[1:], (row[0][0], 1)], strict=True):
                weight = self.seconds[one] - period * (its - ahead)
                self.distance[one, other] = max(self.distance[one, other], weight)
        count = len(fixed)
        part = self.distance[:count, :count]
        for k in range(count):
            np.maximum(part, part[:, k, None] + part[None, k, :], out=part)
        self.feasible = bool((np.diagonal(part) <= _ROUNDING * period).all())

    def _wait(self, first: Action, second: Action, lag: int, extra: float = 0.0) -> None:
        one, other = self.number[first], self.number[second]
        weight = float(self.seconds[one]) + extra - self.period * lag
        self.before[other].append((one, weight))
        self.after[one].append((other, weight))

    def insert(self, action: Action, furthest: int, latest: bool) -> bool:
        """Place `action` where there is most room, or as late as there is any, at most `furthest` steps ahead of the period;
        False where none has room enough.
        """
        node = self.number[action]
        row = self.rows[self.structure.rank_of(action)]
        own = self.seconds[node]
        before = [(u, w) for u, w in self.before[node] if self.placed[u]]
        after = [(v, w) for v, w in self.after[node] if self.placed[v]]
        ones = np.array([u for u, _ in row])
        others = np.array([*(v for v, _ in row[1:]), row[0][0]])
        ahead = np.array([s for _, s in row])
        its = np.array([*(s for _, s in row[1:]), row[0][1] + 1])
        ends = [i for i, (other, _) in enumerate(row) if self.ends[other]]
        last = min(ends) - 1 if action.op is Op.WEIGHT and ends else len(row) - 1  # never behind the update
        best: tuple[float, int, int] | None = None
        for steps in range(furthest + 1):
            into = self.seconds[ones] - self.period * (steps - ahead)  # from the neighbour before
            out = own - self.period * (its - steps)  # to the neighbour after
            tight = self.distance[others, ones] + into + out
            for v, w in after:
                tight = np.maximum(tight, self.distance[v, ones] + into + w)
            for u, w in before:
                tight = np.maximum(tight, self.distance[others, u] + w + out)
                for v, far in after:
                    tight = np.maximum(tight, self.distance[v, u] + w + far)
            tight = tight[: last + 1]
            least = _ROUNDING * self.period
            room = -tight.min()
            if best is None or room > best[0] + least:
                best = (room, steps, int(np.flatnonzero(tight <= (least if latest else least - room))[-1:].sum()))
            if latest and room >= -least:
                break
        assert best is not None
        room, steps, position = best
        if room < -_ROUNDING * self.period:
            return False
        before.append(
            (int(ones[position]), float(self.seconds[ones[position]] - self.period * (steps - ahead[position])))
        )
        after.append((int(others[position]), float(own - self.period * (its[position] - steps))))
        row.insert(position + 1, (node, steps))
        self._place(node, before, after)
        return True

    def _place(self, node: int, before: list[tuple[int, float]], after: list[tuple[int, float]]) -> None:
        distance = self.distance
        into = np.max([distance[:, u] + w for u, w in before], axis=0)
        out = np.max([distance[v, :] + w for v, w in after], axis=0)
        distance[:, node] = np.maximum(distance[:, node], into)
        distance[node, :] = np.maximum(distance[node, :], out)
        used = np.flatnonzero(self.placed)
        grid = np.ix_(used, used)
        distance[grid] = np.maximum(distance[grid], into[used, None] + out[None, used])
        self.placed[node] = True

    def result(self) -> list[list[Action]]:
        """Every rank's row of one period, which ends with what ends a step there."""
        actions = list(self.number)
        rows = [[actions[node].at(steps) for node, steps in row] for row in self.rows]
        return [self._with_move(rank, row) for rank, row in enumerate(rows)] if self.structure.momentum else rows

    def timed(self) -> list[list[tuple[float, Action]]]:
        """Every rank's row with start times that keep the period."""
        actions = list(self.number)
        start = self.distance[self.rows[0][0][0]]
        return [[(float(start[node]), actions[node]) for node, _ in row] for row in self.rows]

    def _with_move(self, rank: int, row: list[Action]) -> list[Action]:
        """The teacher's weights move once all forwards are over that read what they were, and the update is done."""
        last = max(i for i, action in enumerate(row) if _ends_teacher(action, self.structure))
        updated = next(i for i, action in enumerate(row) if action.op is Op.UPDATE)
        end = 1 + max(updated, last + (self.structure.staleness - row[last].step) * len(row))
        around = [(i // len(row), row[i % len(row)]) for i in range(end - len(row), end)]
        turned = [action.at(action.step + periods) for periods, action in around]
        return [*turned, Action(Role.TEACHER, rank, Op.EMA, None, 0)]


def _ends_teacher(action: Action, structure: PipelineStructure) -> bool:
    is_forward = action.role is Role.TEACHER and action.op is Op.FORWARD
    return is_forward and action.microbatch == structure.num_units(Role.TEACHER) - 1


def in_order(actions: Sequence[Action]) -> list[Edge]:
    """Work that a stage does one after the other."""
    return [(one, other, 0) for one, other in pairwise(actions)] + [(actions[-1], actions[0], 1)]


def stash_bounds(structure: PipelineStructure, stage: int, stash: int) -> list[Edge]:
    """A stage starts a forward once the backward `stash` units before has ended."""
    ends = structure.backward_ops[-1]
    units = structure.num_units(Role.STUDENT)
    return [
        (Action(Role.STUDENT, stage, ends, u - stash, 0), Action(Role.STUDENT, stage, Op.FORWARD, u, 0), 0)
        for u in range(stash, units)
    ]
