"""The schedule that a strategy's name stands for."""

from typing import Any

from pipestill.costs import StageCosts
from pipestill.errors import PlanError, nearest
from pipestill.schedule.pipeline.fill import fill
from pipestill.schedule.pipeline.gpipe import gpipe
from pipestill.schedule.pipeline.one_f_one_b import one_f_one_b
from pipestill.schedule.pipeline.sequential import sequential
from pipestill.schedule.pipeline.structure import PipelineStructure
from pipestill.schedule.pipeline.tspipe import asynchronous, tspipe
from pipestill.schedule.schedule import Schedule

PIPELINE_STRATEGIES = {
    "sequential": "inter-layer model parallelism: one device works at a time",
    "gpipe": "teacher first, then all student forwards, then all backwards",
    "1f1b": "teacher first, then one student forward and one backward in turn",
    "tspipe": "TSPipe's schedule: the teacher one batch ahead around the backwards (momentum teachers: one step stale)",
    "async": "no step waits for the one before; both models one step stale (ablation, momentum teachers)",
    "fill": "1F1B student, teacher forwards prefetched into its bubbles (exact, or one step stale on demand)",
}
"""Every strategy that a schedule can be generated for, with one line about it."""

_SIMPLE = {"sequential": sequential, "gpipe": gpipe, "1f1b": one_f_one_b, "tspipe": tspipe, "async": asynchronous}


def generate(
    strategy: str,
    num_stages: int,
    num_microbatches: int,
    *,
    teacher: bool = True,
    costs: StageCosts | None = None,
    staleness: int | None = None,
    split_backward: bool = False,
    stash: int | str | None = None,
    run_ahead: int | None = None,
    **work: Any,
) -> Schedule[PipelineStructure]:
    """Generate the schedule of a strategy.

    Args:
        strategy: one of `PIPELINE_STRATEGIES`
        num_stages: stages of each model; stage i of both is on rank i
        num_microbatches: slices of a batch
        teacher: whether there is one
        costs: seconds of each kind of work on each stage, for strategy 'fill' (default: all stages alike)
        staleness: how many steps old a momentum teacher's weights are, for 'fill' (default: 0)
        split_backward: whether 'fill' separates gradients of weights from those of inputs
        stash: most microbatches that a rank holds from forward to backward, for 'fill' (see there)
        run_ahead: most units that the teacher is ahead of the student, for 'fill' (see there)
        work: what the task demands, as fields of the `PipelineStructure` (momentum, views, batch_loss, clip)

    Raises:
        PlanError: there is no such strategy, a count is below 1, or the strategy or the task does not have such a knob
    """
    if num_stages < 1:
        raise PlanError(f"{num_stages} stages; expected at least 1")
    if num_microbatches < 1:
        raise PlanError(f"{num_microbatches} microbatches; expected at least 1 (--microbatches)")
    if strategy not in PIPELINE_STRATEGIES:
        known = ", ".join(PIPELINE_STRATEGIES)
        raise PlanError(f"no strategy '{strategy}'{nearest(strategy, PIPELINE_STRATEGIES)}; there are {known}")
    if work.get("momentum") and not teacher:
        raise PlanError("a momentum teacher is asked for, and no teacher at all; choose one")
    views, teacher_views = work.get("views", 1), work.get("teacher_views", 1)
    if not 1 <= teacher_views <= views:
        raise PlanError(f"the teacher sees {teacher_views} of {views} views; expected 1 to all")
    if strategy == "fill":
        if staleness and not work.get("momentum"):
            raise PlanError("staleness is of a momentum teacher; a frozen one has no versions; leave it out")
        if staleness not in (None, 0, 1):
            raise PlanError(f"staleness is {staleness}; expected 0 or 1")
        return fill(
            num_stages, num_microbatches, teacher=teacher, costs=costs, stash=stash, run_ahead=run_ahead,
            staleness=staleness or 0, split=split_backward, **work,
        )  # fmt: skip
    knobs = {"split_backward": split_backward or None, "stash": stash, "run_ahead": run_ahead, "staleness": staleness}
    for name, value in knobs.items():
        if value is not None:
            raise PlanError(f"{name} is a knob of 'fill'; strategy '{strategy}' has none; leave it out")
    return _SIMPLE[strategy](num_stages, num_microbatches, teacher=teacher, **work)
