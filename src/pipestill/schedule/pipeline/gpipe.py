"""GPipe: all forwards, then all backwards; the teacher's forwards first.

rank 0   T0 T1 F0 F1 .. .. B0 B1 U
rank 1   .. T0 T1 F0 F1 B0 B1 U        (time runs right; here all work takes equally long)
"""

from typing import Any

from pipestill.schedule.action import Role
from pipestill.schedule.comms import connect
from pipestill.schedule.pipeline.one_f_one_b import student_order, teacher_order
from pipestill.schedule.pipeline.structure import PipelineStructure, pipeline
from pipestill.schedule.schedule import Schedule


def gpipe(num_stages: int, num_microbatches: int, *, teacher: bool = True, **work: Any) -> Schedule[PipelineStructure]:
    """Run all teacher forwards, all student forwards, all backwards, and then the update on every rank.

    GPipe (Huang et al., NeurIPS 2019), section 2.3. `work`: further fields of the `PipelineStructure`.
    """
    structure = pipeline(num_stages, num_microbatches, teacher=teacher, **work)
    units = structure.num_units(Role.STUDENT)
    rows = [teacher_order(stage, structure) + student_order(stage, structure, units) for stage in range(num_stages)]
    run_ahead = structure.num_units(Role.TEACHER) if teacher else 0
    return connect("gpipe", structure, rows, (units,) * num_stages, run_ahead)
