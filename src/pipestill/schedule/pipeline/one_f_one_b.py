"""1F1B: after a short warm-up, every rank alternates one forward and one backward; the teacher's forwards first.

rank 0   T0 T1 T2 F0 F1 .. B0 F2 B1 .. B2 U
rank 1   .. T0 T1 T2 F0 B0 F1 B1 F2 B2 U     (time runs right; here all work takes equally long)
"""

from __future__ import annotations

from typing import Any

from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.comms import connect
from pipestill.schedule.pipeline.structure import PipelineStructure, pipeline
from pipestill.schedule.schedule import Schedule


def teacher_order(stage: int, structure: PipelineStructure) -> list[Action]:
    """One rank's teacher forwards of a step; none without a teacher."""
    units = structure.num_units(Role.TEACHER) if structure.teacher_ranks else 0
    return [Action(Role.TEACHER, stage, Op.FORWARD, u, 0) for u in range(units)]


def student_order(stage: int, structure: PipelineStructure, ahead: int) -> list[Action]:
    """One rank's student work: `ahead` forwards, then backward and forward in turn, and what ends a step.

    Of a backward in two halves, the first alone. The loss stands before the first backward that needs it.
    """
    units = structure.num_units(Role.STUDENT)
    order = [Action(Role.STUDENT, stage, Op.FORWARD, u, 0) for u in range(min(ahead, units))]
    for u in range(units):
        loss = structure.loss_of_unit(u)
        if stage == structure.last and u == structure.units_of_loss(loss, Role.STUDENT)[0]:
            order.append(Action(Role.STUDENT, stage, Op.LOSS, loss, 0))
        order.append(Action(Role.STUDENT, stage, structure.backward_ops[0], u, 0))
        if u + ahead < units:
            order.append(Action(Role.STUDENT, stage, Op.FORWARD, u + ahead, 0))
    return [*order, *step_end(stage, structure)]


def step_end(stage: int, structure: PipelineStructure) -> list[Action]:
    """What a stage does after its last backward."""
    ends = [Action(Role.STUDENT, stage, Op.NORM, None, 0)] if structure.clip else []
    ends.append(Action(Role.STUDENT, stage, Op.UPDATE, None, 0))
    return [*ends, Action(Role.TEACHER, stage, Op.EMA, None, 0)] if structure.momentum else ends


def warm_up(structure: PipelineStructure, stash: int) -> tuple[int, ...]:
    """For each stage, how many forwards come before its first backward, where it may hold `stash` units.

    A stage that waits for the loss of those after it needs one more than the next; with twice as many, gradients
    come back while there is still work to send. The last holds what one loss takes.
    """
    n, units = len(structure.student_ranks), structure.num_units(Role.STUDENT)
    at_loss = len(structure.units_of_loss(0, Role.STUDENT))
    return tuple(min(units, max(at_loss + n - 1 - stage, stash - 2 * stage)) for stage in range(n))


def least_stash(structure: PipelineStructure) -> int:
    """What the first stage of 1F1B has to hold: a unit for every stage, and all that one loss takes for the last."""
    return min(structure.num_units(Role.STUDENT), len(structure.units_of_loss(0, Role.STUDENT)) + structure.last)


def one_f_one_b(
    num_stages: int, num_microbatches: int, *, teacher: bool = True, **work: Any
) -> Schedule[PipelineStructure]:
    """Every rank runs all teacher forwards, then the student's 1F1B (PipeDream-Flush, Narayanan et al.)."""
    structure = pipeline(num_stages, num_microbatches, teacher=teacher, **work)
    ahead = warm_up(structure, least_stash(structure))
    rows = [
        teacher_order(stage, structure) + student_order(stage, structure, ahead[stage]) for stage in range(num_stages)
    ]
    return connect("1f1b", structure, rows, ahead, structure.num_units(Role.TEACHER) if teacher else 0)
