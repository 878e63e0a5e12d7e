"""Schedules in the order of a plain loop: inter-layer model parallelism, in which one device works at a time; validation.

rank 0   T0 .. F0 .. .. B0 T1 .. F1 .. .. B1 U
rank 1   .. T0 .. F0 B0 .. .. T1 .. F1 B1 U        (time runs right; here all work takes equally long)
"""

from typing import Any

from pipestill.schedule.action import Op, Role
from pipestill.schedule.comms import connect
from pipestill.schedule.pipeline.structure import PipelineStructure, pipeline
from pipestill.schedule.pipeline.work import Rows
from pipestill.schedule.schedule import Schedule


def sequential(num_stages: int, num_microbatches: int, *, teacher: bool = True, **work: Any) -> Schedule[PipelineStructure]:
    """Run each microbatch through the whole teacher, the whole student and back before the next one starts.

    A loss over the whole batch comes between all forwards and all backwards. `work`: further fields of the `PipelineStructure`.
    """
    structure = pipeline(num_stages, num_microbatches, teacher=teacher, serial=True, **work)
    stash = (len(structure.units_of_loss(0, Role.STUDENT)),) * num_stages
    run_ahead = structure.teacher_views if teacher else 0
    return connect("sequential", structure, _loop_order(structure), stash, run_ahead)


def forward_only(num_stages: int, num_microbatches: int) -> Schedule[PipelineStructure]:
    """Run the student's forwards and the loss of each microbatch, without gradients: what a validation runs."""
    structure = pipeline(num_stages, num_microbatches, teacher=False, train=False)
    return connect("forward-only", structure, _loop_order(structure), (0,) * num_stages, run_ahead=0)


def _loop_order(structure: PipelineStructure) -> Rows:
    """Each rank's work of one step in the order of a plain loop."""
    rows: Rows = [[] for _ in range(structure.num_ranks)]
    for action in structure.actions():
        if action.op is not Op.DATA:
            rows[structure.rank_of(action)].append(action)
    return rows
