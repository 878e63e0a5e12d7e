"""Strategy names -> schedules."""

from __future__ import annotations

from pipestill.costs import StageCosts
from pipestill.errors import PlanError, nearest
from pipestill.schedule.fill import fill
from pipestill.schedule.gpipe import gpipe
from pipestill.schedule.one_f_one_b import one_f_one_b
from pipestill.schedule.program import Schedule
from pipestill.schedule.sequential import sequential

STRATEGIES = {
    "sequential": "inter-layer model parallelism: one device works at a time",
    "gpipe": "teacher first, then all student forwards, then all backwards",
    "1f1b": "teacher first, then one student forward and one backward in turn",
    "fill": "1F1B student, teacher forwards prefetched into its bubbles (exact)",
}
"""Every strategy that a schedule can be generated for, with one line about it."""


def generate(
    strategy: str,
    num_stages: int,
    num_microbatches: int,
    *,
    teacher: bool = True,
    costs: StageCosts | None = None,
    run_ahead: int | None = None,
) -> Schedule:
    """The schedule of `strategy`. `costs` and `run_ahead` matter to `fill` alone.

    Raises `PlanError` for an unknown strategy or counts below 1.
    """
    if num_stages < 1:
        raise PlanError(f"{num_stages} stages; expected at least 1")
    if num_microbatches < 1:
        raise PlanError(f"{num_microbatches} microbatches; expected at least 1 (--microbatches)")
    if strategy == "fill":
        return fill(num_stages, num_microbatches, teacher=teacher, costs=costs, run_ahead=run_ahead)
    if run_ahead is not None:
        raise PlanError(f"run_ahead is a knob of 'fill'; strategy '{strategy}' has none; leave it out")
    if strategy == "sequential":
        return sequential(num_stages, num_microbatches, teacher=teacher)
    if strategy == "gpipe":
        return gpipe(num_stages, num_microbatches, teacher=teacher)
    if strategy == "1f1b":
        return one_f_one_b(num_stages, num_microbatches, teacher=teacher)
    raise PlanError(f"no strategy '{strategy}'{nearest(strategy, STRATEGIES)}; there are {', '.join(STRATEGIES)}")
