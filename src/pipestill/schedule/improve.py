"""Local search: flexible work changes places with its neighbours while that makes the period no longer."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from pipestill.costs import StageCosts
from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.needs import needs
from pipestill.schedule.program import Structure
from pipestill.schedule.simulate import action_seconds, transfer_seconds

Rows = list[list[Action]]
_PERIODS = 9


def improve(rows: Rows, clock: Clock, goal: float, tries: int, most_steps: int) -> Rows:
    """Rows whose period is as short as `tries` moves from `rows` get it; stops early at `goal`.

    A move takes a teacher forward, or a gradient of weights, a few places along its row, past others of its kind never,
    and at most `most_steps` steps ahead. The moves are drawn from a generator with a fixed seed, so every rank finds the same.
    """
    best, period = rows, clock.period(rows)
    draw = random.Random(0)
    for _ in range(tries):
        if period is None or period <= goal:
            break
        candidate = _moved(best, clock.structure, draw, most_steps)
        if candidate is None:
            continue
        found = clock.period(candidate)
        if found is not None and found <= period * (1 + 1e-12):
            best, period = candidate, found
    return best


def _moved(rows: Rows, structure: Structure, draw: random.Random, most_steps: int) -> Rows | None:
    rank = draw.randrange(len(rows))
    row = list(rows[rank])
    flexible = [i for i, a in enumerate(row) if _is_flexible(a)]
    if not flexible:
        return None
    at, by = draw.choice(flexible), draw.choice((-3, -2, -1, 1, 2, 3))
    action = row.pop(at)
    step = 1 if by > 0 else -1
    for _ in range(abs(by)):
        if not 0 <= at + min(step, 0) < len(row):  # over the end of the period: the same work of the step beside
            if action.step - step < 0 or action.step - step > most_steps or action.op is Op.WEIGHT:
                return None
            action = action.at(action.step - step)
            at = 0 if step > 0 else len(row)
            passed = None
        else:
            passed = row[at + min(step, 0)]
            at += step
        if passed is None and structure.momentum and not structure.staleness:
            return None
        if passed is not None and (_same_kind(passed, action) or _forbidden(passed, action, structure)):
            return None
    row.insert(at, action)
    return [*rows[:rank], row, *rows[rank + 1 :]]


def _is_flexible(action: Action) -> bool:
    return action.op is Op.WEIGHT or (action.role is Role.TEACHER and action.op is Op.FORWARD)


def _same_kind(one: Action, other: Action) -> bool:
    return (one.role, one.op) == (other.role, other.op)


def _forbidden(passed: Action, action: Action, structure: Structure) -> bool:
    """What would change the weights that the teacher reads, or an update without some gradient."""
    if action.op is Op.WEIGHT:
        return passed.op in (Op.NORM, Op.UPDATE, Op.EMA) or passed == dataclasses.replace(action, op=Op.INPUT)
    if passed.op is Op.LOSS and passed.step == action.step:
        return action.at(0) in needs(passed.at(0), structure)
    return structure.momentum and passed.op is Op.EMA


class Clock:
    """Times rows, as the simulator does without contention, and faster."""

    def __init__(self, structure: Structure, costs: StageCosts) -> None:
        self.structure, self.costs = structure, costs
        self.seconds = {a: action_seconds(a, structure, costs) * costs.interference for a in structure.actions()}
        self.needed: dict[Action, list[tuple[Action, int, float]]] = {}
        for action in self.seconds:
            rank = structure.rank_of(action)
            self.needed[action] = [
                (need.at(0), need.step, transfer_seconds(need, structure, costs))
                for need in needs(action, structure)
                if structure.rank_of(need) != rank and need.op is not Op.DATA
            ]

    def period(self, rows: Sequence[Sequence[Action]]) -> float | None:
        """Mean seconds of a late period; None where a rank gets stuck."""
        written = {a.at(0): a.step for row in rows for a in row}
        todo = [
            [
                (a.at(0), self.seconds[a.at(0)], [(n, a.step + d - written[n], c) for n, d, c in self.needed[a.at(0)]])
                for a in row
            ]
            for row in rows
        ]
        ends: dict[Action, list[float]] = {a: [] for a in written}
        where, now = [0] * len(rows), [0.0] * len(rows)
        marks: list[list[float]] = [[] for _ in rows]
        moved = True
        while moved:
            moved = False
            for rank, row in enumerate(todo):
                position, time = where[rank], now[rank]
                while position < len(row) * _PERIODS:
                    period, index = divmod(position, len(row))
                    action, seconds, needed = row[index]
                    for need, lag, comm in needed:
                        at = period + lag
                        if at < 0:
                            continue
                        done = ends[need]
                        if at >= len(done):
                            if at < _PERIODS:
                                break
                            continue
                        if done[at] + comm > time:
                            time = done[at] + comm
                    else:
                        time += seconds
                        ends[action].append(time)
                        position += 1
                        if index == len(row) - 1:
                            marks[rank].append(time)
                        continue
                    break
                if position != where[rank]:
                    where[rank], now[rank], moved = position, time, True
        if any(len(mark) < _PERIODS for mark in marks):
            return None
        half = _PERIODS // 2
        return max((mark[-2] - mark[half - 1]) / (_PERIODS - 1 - half) for mark in marks)
