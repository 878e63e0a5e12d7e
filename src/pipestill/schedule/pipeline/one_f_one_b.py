"""1F1B: after a short warm-up, every rank alternates one forward and one backward; the teacher's forwards first.

rank 0   T0 T1 T2 F0 F1 .. B0 F2 B1 .. B2 U
rank 1   .. T0 T1 T2 F0 B0 F1 B1 F2 B2 U     (time runs right; here all work takes equally long)
"""

from typing import Any

from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.comms import connect
from pipestill.schedule.pipeline.structure import PipelineStructure, pipeline
from pipestill.schedule.schedule import Schedule


def teacher_order(stage: int, structure: PipelineStructure) -> list[Action]:
    """A stage's teacher forwards in a step; none without a teacher."""
    units = structure.num_units(Role.TEACHER) if structure.teacher_ranks else 0
    return [Action(Role.TEACHER, stage, Op.FORWARD, u, 0) for u in range(units)]


def student_order(stage: int, structure: PipelineStructure, ahead: int) -> list[Action]:
    """A stage's student work in a step: its passes (see `student_passes`), and what ends the step."""
    return [*student_passes(stage, structure, ahead), *step_end(stage, structure)]


def student_passes(stage: int, structure: PipelineStructure, ahead: int) -> list[Action]:
    """A stage's passes of the student: `ahead` forwards, and then a backward and a forward in turn.

    A stage's loss stands before the first backward that needs it. Of a backward in two halves, only the first is here.
    """
    units = structure.num_units(Role.STUDENT)
    order = [Action(Role.STUDENT, stage, Op.FORWARD, u, 0) for u in range(min(ahead, units))]
    for u in range(units):
        loss = structure.loss_of_unit(u)
        if stage in structure.loss_stages and u == structure.units_of_loss(loss, Role.STUDENT)[0]:
            order.append(Action(Role.STUDENT, stage, Op.LOSS, loss, 0))
        order.append(Action(Role.STUDENT, stage, structure.backward_ops[0], u, 0))
        if u + ahead < units:
            order.append(Action(Role.STUDENT, stage, Op.FORWARD, u + ahead, 0))
    return order


def step_end(stage: int, structure: PipelineStructure) -> list[Action]:
    """A stage's work after the last backward of a step: shared gradients, clipping's norm, the updates of both models."""
    ends = [Action(Role.STUDENT, stage, Op.GATHER, None, 0)] if stage in structure.ties else []
    ends += [Action(Role.STUDENT, stage, Op.NORM, None, 0)] if structure.clip else []
    ends.append(Action(Role.STUDENT, stage, Op.UPDATE, None, 0))
    return [*ends, Action(Role.TEACHER, stage, Op.EMA, None, 0)] if structure.momentum else ends


def warm_up(structure: PipelineStructure, stash: int) -> tuple[int, ...]:
    """For each stage, the number of forwards before its first backward, where the first stage may hold `stash` units.

    A stage needs one forward more than the next, since its gradient comes one hop later; the last stage holds what one loss
    takes. With two more for each stage, gradients come back while there is still work to send.
    """
    units = structure.num_units(Role.STUDENT)
    units_of_a_loss = len(structure.units_of_loss(0, Role.STUDENT))
    warm_ups = []
    for stage in range(len(structure.student_ranks)):
        needed = units_of_a_loss + structure.last - stage
        allowed = stash - 2 * stage
        warm_ups.append(min(units, max(needed, allowed)))
    return tuple(warm_ups)


def least_stash(structure: PipelineStructure) -> int:
    """The units that the first stage of 1F1B holds: one for every stage, but for the last all that one loss takes."""
    return min(structure.num_units(Role.STUDENT), len(structure.units_of_loss(0, Role.STUDENT)) + structure.last)


def one_f_one_b(num_stages: int, num_microbatches: int, *, teacher: bool = True, **work: Any) -> Schedule[PipelineStructure]:
    """Run all teacher forwards, and then the student's forwards and backwards in turn, on every rank.

    1F1B with a flush (Narayanan et al., SC 2021), section 2.2. `work`: further fields of the `PipelineStructure`.
    """
    structure = pipeline(num_stages, num_microbatches, teacher=teacher, **work)
    warm_ups = warm_up(structure, least_stash(structure))
    rows = [teacher_order(stage, structure) + student_order(stage, structure, ahead) for stage, ahead in enumerate(warm_ups)]
    return connect("1f1b", structure, rows, warm_ups, structure.num_units(Role.TEACHER) if teacher else 0)
