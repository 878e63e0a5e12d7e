"""The student's forwards alone: what a validation runs.

rank 0   F0 F1 F2
rank 1   .. F0 F1 F2        (time runs right; here all forwards take equally long)
"""

from __future__ import annotations

from pipestill.schedule.comms import connect
from pipestill.schedule.pipeline.structure import PipelineStructure, pipeline
from pipestill.schedule.pipeline.work import loop_order
from pipestill.schedule.schedule import Schedule


def forward_only(num_stages: int, num_microbatches: int) -> Schedule[PipelineStructure]:
    """Run the student's forwards and the loss of each microbatch, without gradients."""
    structure = pipeline(num_stages, num_microbatches, teacher=False, train=False)
    return connect("forward-only", structure, loop_order(structure), (0,) * num_stages, run_ahead=0)
