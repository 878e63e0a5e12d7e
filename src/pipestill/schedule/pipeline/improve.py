"""Local search: flexible work changes places with its neighbours while that makes the period no longer.

Flexible are the teacher's forwards and gradients of weights. A move takes one of them a few places along its row:

    a row                    F0  B0  t1  F1  B1  U
    t1 one place earlier     F0  t1  B0  F1  B1  U
    t1 two places later      F0  B0  F1  B1  t1  U

Rows repeat, so a move over the end of the row goes on at its beginning, where the same forward has another step.
"""

import dataclasses
import random

from pipestill.schedule.action import Action, Op
from pipestill.schedule.pipeline.clock import Clock
from pipestill.schedule.pipeline.needs import needs
from pipestill.schedule.pipeline.structure import PipelineStructure
from pipestill.schedule.pipeline.work import Rows, is_teacher_forward

_ROUNDING = 1e-12
_DISTANCES = (-3, -2, -1, 1, 2, 3)  # places of a move


def improve(rows: Rows, clock: Clock, goal: float, tries: int, most_steps: int) -> Rows:
    """Find rows whose period is as short as so many moves from `rows` get it.

    Work never passes other work of its kind. The moves are drawn from a generator with a fixed seed, so every rank finds the
    same.

    Args:
        rows: where the search starts
        clock: the timer of the structure
        goal: seconds of a period with which the search ends
        tries: most moves that are tried
        most_steps: the most steps that work may be ahead
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
        if found is not None and found <= period * (1 + _ROUNDING):
            best, period = candidate, found
    return best


def _moved(rows: Rows, structure: PipelineStructure, draw: random.Random, most_steps: int) -> Rows | None:
    """Rows after a random move on a random rank; None where that is not allowed."""
    rank = draw.randrange(len(rows))
    flexible = [i for i, action in enumerate(rows[rank]) if action.op is Op.WEIGHT or is_teacher_forward(action)]
    if not flexible:
        return None
    place = draw.choice(flexible)
    row = _with_move(rows[rank], place, draw.choice(_DISTANCES), structure, most_steps)
    return None if row is None else [*rows[:rank], row, *rows[rank + 1 :]]


def _with_move(
    row: list[Action], place: int, distance: int, structure: PipelineStructure, most_steps: int
) -> list[Action] | None:
    """The row after the action at `place` went so many places on, or back where `distance` is below 0; None where it may not."""
    row = list(row)
    action = row.pop(place)
    forward = distance > 0
    for _ in range(abs(distance)):
        neighbour = place if forward else place - 1
        if 0 <= neighbour < len(row):
            if not _may_pass(action, row[neighbour], structure):
                return None
            place += 1 if forward else -1
        else:
            action = action.at(action.step + (-1 if forward else 1))
            if not _may_leave_period(action, structure, most_steps):
                return None
            place = 0 if forward else len(row)
    row.insert(place, action)
    return row


def _may_leave_period(action: Action, structure: PipelineStructure, most_steps: int) -> bool:
    """Whether an action may stand beyond the end of the period, with the step that it has there."""
    bound_to_step = action.op is Op.WEIGHT or (structure.momentum and not structure.staleness)
    return not bound_to_step and 0 <= action.step <= most_steps


def _may_pass(action: Action, other: Action, structure: PipelineStructure) -> bool:
    """Whether an action may change places with its neighbour: no need, update or order of its kind is in the way."""
    if (other.role, other.op) == (action.role, action.op):
        return False
    if action.op is Op.WEIGHT:
        own_input = dataclasses.replace(action, op=Op.INPUT)
        return other.op not in (Op.GATHER, Op.NORM, Op.UPDATE, Op.EMA) and other != own_input
    if other.op is Op.LOSS and other.step == action.step:
        return action.at(0) not in needs(other.at(0), structure)
    return not (structure.momentum and other.op is Op.EMA)
