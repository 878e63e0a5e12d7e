"""Rows that are woven for a given period: what may be put off, and what is to be kept then.

The student's forwards and gradients of inputs keep their order. Gradients of weights and the teacher's forwards are put into
it by a `Weaver`, from the last one of a step to the first, so that each leaves room for those before it.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import ceil

from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.pipeline.candidates import Candidates
from pipestill.schedule.pipeline.pack import labelled
from pipestill.schedule.pipeline.structure import PipelineStructure
from pipestill.schedule.pipeline.weaver import Bound, Weaver
from pipestill.schedule.pipeline.work import Rows, Timed


def weave(base: Candidates, period: float, latest: bool) -> Rows | None:
    """Weave rows that repeat in `period` seconds; None where that does not come out.

    Args:
        base: the student's orders, and what is to be kept
        period: seconds
        latest: see `Weaver.insert`
    """
    s, stages = base.structure, range(len(base.orders))
    weights = [_units_of(s, Role.STUDENT, stage, Op.WEIGHT) for stage in stages] if s.split else []
    forwards = [_units_of(s, Role.TEACHER, stage, Op.FORWARD) for stage in stages] if s.teacher_ranks else []
    bounds = [bound for of_stage in weights for bound in in_order(of_stage)]
    for stage in stages:
        if s.split:
            bounds += stash_bounds(s, stage, base.stash[stage])
        if s.momentum:
            bounds += [*teacher_bounds(s, stage, base.run_ahead), *in_order(forwards[stage])]
    fixed = [[action for action in order if action.op is not Op.EMA] for order in base.orders]
    flexible = [action for of_stage in (*weights, *forwards) for action in of_stage]
    weaver = Weaver(s, base.costs, fixed, flexible, period, bounds)
    last_first = [action for of_stage in weights for action in reversed(of_stage)]
    if not (weaver.feasible and all(weaver.insert(action, 0, latest) for action in last_first)):
        return None
    if s.momentum or not s.teacher_ranks:
        last_first = [action for of_stage in reversed(forwards) for action in reversed(of_stage)]
        inserted = all(weaver.insert(action, 1 + s.staleness, latest) for action in last_first)
        return weaver.result() if inserted else None
    # A frozen teacher's forwards may be of any step: where they stand is chosen first, and then which they are.
    if not all(weaver.insert(action, 0, latest) for of_stage in forwards for action in of_stage):
        return None
    timed = [[Timed(start, None if action.role is Role.TEACHER else action) for start, action in row] for row in weaver.timed()]
    return labelled(timed, s, base.costs, period)


def _units_of(structure: PipelineStructure, role: Role, stage: int, op: Op) -> list[Action]:
    """All work of one kind of a stage in a step."""
    return [Action(role, stage, op, unit, 0) for unit in range(structure.num_units(role))]


def in_order(actions: Sequence[Action]) -> list[Bound]:
    """Bounds of work that a stage does one after the other, step by step."""
    return [Bound(one, other, 0) for one, other in pairwise(actions)] + [Bound(actions[-1], actions[0], 1)]


def stash_bounds(structure: PipelineStructure, stage: int, stash: int) -> list[Bound]:
    """Bounds that let a stage start a forward once the backward of `stash` units before has ended."""
    ends = structure.backward_ops[-1]
    units = structure.num_units(Role.STUDENT)
    return [
        Bound(Action(Role.STUDENT, stage, ends, u - stash, 0), Action(Role.STUDENT, stage, Op.FORWARD, u, 0), 0)
        for u in range(stash, units)
    ]


def teacher_bounds(structure: PipelineStructure, stage: int, run_ahead: int | None) -> list[Bound]:
    """Bounds on when a momentum teacher may start a batch.

    It starts after the update whose weights it reads, and runs at most `run_ahead` units ahead of the student.
    """
    s = structure
    update = Action(Role.STUDENT, stage, Op.UPDATE, None, 0)
    bounds = []
    for unit, forward in enumerate(_units_of(s, Role.TEACHER, stage, Op.FORWARD)):
        bounds.append(Bound(update, forward, 1 + s.staleness))
        if run_ahead is not None:
            # Of the student's forwards, counted over all steps, the one that has to be done: before 0, of an earlier step.
            last_done = ceil((unit + 1 - run_ahead) * s.views / s.teacher_views) - 1
            step, student_unit = divmod(last_done, s.num_units(Role.STUDENT))
            bounds.append(Bound(Action(Role.STUDENT, stage, Op.FORWARD, student_unit, 0), forward, -step))
    return bounds
