"""TSPipe's own schedule, and the asynchronous one that it is compared with (Lim et al., ICML 2022).

rank 0   F0 F1 t0 t1 B0 B1 U        (time runs right; t: the teacher's forward of the next batch; equally long work)
rank 1   .. F0 F1 B0 B1 t0 t1 U
"""

from typing import Any

from pipestill.costs import StageCosts
from pipestill.errors import PlanError
from pipestill.schedule.action import Role
from pipestill.schedule.comms import connect
from pipestill.schedule.deadlock import never_stuck
from pipestill.schedule.pipeline.greedy import Greedy
from pipestill.schedule.pipeline.one_f_one_b import least_stash, step_end, student_passes, teacher_order, warm_up
from pipestill.schedule.pipeline.structure import PipelineStructure, pipeline
from pipestill.schedule.schedule import Schedule


def tspipe(num_stages: int, num_microbatches: int, *, teacher: bool = True, **work: Any) -> Schedule[PipelineStructure]:
    """Run TSPipe's order: all student forwards, some teacher forwards of the next batch, all backwards, the other forwards.

    Stage i of n runs 2 (n - 1 - i) teacher forwards before the backwards. Backwards run in units of half a microbatch, and so
    does everything else here: a forward of the paper is two of these, one right after the other. (In the released code the
    second half's gradients were dropped.) A momentum teacher is one step stale; the first two steps both read its initial
    weights. `work`: further fields of the `PipelineStructure`. Raises `PlanError` without a teacher.
    """
    if not teacher:
        raise PlanError("'tspipe' fills a student's bubbles with a teacher's work; this task has none; use '1f1b'")
    momentum = bool(work.get("momentum"))
    structure = pipeline(num_stages, 2 * num_microbatches, staleness=int(momentum), pieces=2, **work)
    units = structure.num_units(Role.STUDENT)
    rows = []
    for stage in range(num_stages):
        passes, ends = student_passes(stage, structure, units), step_end(stage, structure)
        forwards = [action.at(1) for action in teacher_order(stage, structure)]
        early = 2 * (num_stages - 1 - stage) * structure.pieces
        rows.append([*passes[:units], *forwards[:early], *passes[units:], *forwards[early:], *ends])
    return connect("tspipe", structure, rows, (units,) * num_stages, 2 * structure.num_units(Role.TEACHER))


def asynchronous(num_stages: int, num_microbatches: int, *, teacher: bool = True, **work: Any) -> Schedule[PipelineStructure]:
    """Let no step wait for the update of the one before: teacher and student read weights that are one step old.

    `work`: further fields of the `PipelineStructure`. Raises `PlanError` without a momentum teacher: with a frozen one nothing
    but the student would be stale.
    """
    if not teacher or not work.get("momentum"):
        raise PlanError("'async' is an ablation of momentum teachers; use 'fill', which is exact")
    structure = pipeline(num_stages, num_microbatches, staleness=1, student_staleness=1, **work)
    ones = (1.0,) * num_stages
    costs = StageCosts(ones, (2.0,) * num_stages, (0.0,) * num_stages, ones, views=(1.0,) * structure.views)
    stash = warm_up(structure, least_stash(structure) + num_stages - 1)
    run_ahead = 2 * structure.num_units(Role.TEACHER)
    rows = Greedy(structure, costs, stash, run_ahead).rows()
    if rows is not None:
        schedule = connect("async", structure, rows, stash, run_ahead)
        if never_stuck(schedule):
            return schedule
    # Too few microbatches to settle: each step by itself, with the teacher's next batch in its end.
    rows = []
    for stage, ahead in enumerate(stash):
        teacher_forwards = [action.at(1) for action in teacher_order(stage, structure)]
        rows.append([*student_passes(stage, structure, ahead), *teacher_forwards, *step_end(stage, structure)])
    return connect("async", structure, rows, stash, run_ahead)
