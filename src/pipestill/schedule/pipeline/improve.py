"""Local search: flexible work changes places with its neighbours while that makes the period no longer."""

from __future__ import annotations

import dataclasses
import random

from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.needs import needs
from pipestill.schedule.pipeline.clock import Clock
from pipestill.schedule.pipeline.structure import PipelineStructure

Rows = list[list[Action]]


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


def _moved(rows: Rows, structure: PipelineStructure, draw: random.Random, most_steps: int) -> Rows | None:
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


def _forbidden(passed: Action, action: Action, structure: PipelineStructure) -> bool:
    """What would change the weights that the teacher reads, or an update without some gradient."""
    if action.op is Op.WEIGHT:
        return passed.op in (Op.NORM, Op.UPDATE, Op.EMA) or passed == dataclasses.replace(action, op=Op.INPUT)
    if passed.op is Op.LOSS and passed.step == action.step:
        return action.at(0) in needs(passed.at(0), structure)
    return structure.momentum and passed.op is Op.EMA
