"""Costs without a recipe: uniform stages or a file, and the task that they are of."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from pipestill.costs import Costs
from pipestill.errors import ConfigError
from pipestill.recipes.run_options import NumBytes
from pipestill.schedule.pipeline.structure import Demands


@dataclass(frozen=True)
class CostsOptions:
    """What costs are of, and where they come from.

    Args:
        devices: pipeline stages, or ranks that train blocks
        microbatches: slices of a batch
        costs: a file of costs, or a CSV of blocks; by itself, or with a recipe instead of measuring it
        batch: rows of a batch, with a CSV of blocks (default: the most that was measured)
        teacher: without a recipe: the teacher is frozen, a moving average (ema), or none for a student alone
        views: without a recipe: views of each sample, all seen by both models
        batch_loss: without a recipe: the loss takes the whole batch at once
        clip: without a recipe: gradients are clipped by their global norm
    """

    devices: int = 2
    microbatches: int = 8
    costs: str | None = None
    batch: int | None = None
    teacher: Literal["frozen", "ema", "none"] = "frozen"
    views: int = 1
    batch_loss: bool = False
    clip: bool = False


@dataclass(frozen=True)
class PlanningOptions(CostsOptions):
    """What is planned.

    Args:
        strategy: sequential, gpipe, 1f1b, tspipe, async or fill for a pipeline; dp, ls, relay, relay-dpu, hybrid or balanced for
            blocks (default: fill, or balanced)
        staleness: steps by which the weights of a momentum teacher under 'fill' may be old, 0 or 1 (default: 0)
        estimate: compute the costs of a pipeline for a device that is not here: v100, a100, h100 or h200, with :fp32, :bf16 or
            the like behind it for another precision than its usual one (default: measure costs here)
        memory: most memory that a device may hold, such as 80GB (default: no limit)
    """

    strategy: str | None = None
    staleness: int | None = None
    estimate: str | None = None
    memory: NumBytes | None = None


@dataclass(frozen=True)
class SimulateOptions(PlanningOptions):
    """What is simulated, and what is shown of it.

    Args:
        split_backward: let 'fill' compute gradients of weights apart from those of inputs
        stash: most microbatches that a rank of 'fill' holds between forward and backward: a number, n, 2n-1 or all (default: n,
            and 2n-1 with split backwards)
        run_ahead: most microbatches that the teacher of 'fill' may be ahead of the student (default: as many as help)
        uniform: without a recipe: T,F,BI,BW such as 1,1,1,1: the time that every stage takes for a teacher forward, a student
            forward, its input gradient and its weight gradient
        draw: a .svg or .png file to draw the picture into (default: none)
        steps: steady steps in the picture (default: 2, or one window of batches)
        text: print the schedule too: the actions of each rank in order, with @1 behind those of the next step
        json: print the figures as one JSON object
    """

    split_backward: bool = False
    stash: int | str | None = None
    run_ahead: int | None = None
    uniform: str | None = None
    draw: str | None = None
    steps: int | None = None
    text: bool = False
    json: bool = False


def demands_of(costs: Costs, options: CostsOptions) -> tuple[Costs, Demands]:
    """Give the costs of the task of these options, and what it asks of a schedule; `ConfigError` for costs of another task."""
    if options.views < 1:
        raise ConfigError(f"views is {options.views}; expected at least 1")
    if options.teacher == "ema" and not costs.teacher:
        raise ConfigError("--teacher ema needs costs of a teacher, and these have none")
    if len(costs.views) != options.views:
        raise ConfigError(f"the costs are of {len(costs.views)} views, --views is {options.views}")
    if options.teacher == "none":
        costs = dataclasses.replace(costs, teacher=())
    return costs, Demands(options.teacher == "ema", options.views, options.views, options.batch_loss, options.clip)


def uniform(times: str, options: CostsOptions) -> Costs:
    """Make costs of one block for each stage, all alike, from T,F,BI,BW."""
    try:
        teacher, forward, input_gradient, weight_gradient = (float(x) for x in times.split(","))
    except ValueError:
        raise ConfigError(f"--uniform takes four numbers T,F,BI,BW such as 1,1,1,1, got '{times}'") from None
    if min(teacher, forward, input_gradient, weight_gradient) < 0 or forward + input_gradient + weight_gradient == 0:
        raise ConfigError(f"--uniform takes times of 0 or more, and a student that takes time, got '{times}'")
    return Costs.uniform(
        max(1, options.devices), teacher, forward, input_gradient + weight_gradient, weight=weight_gradient,
        teacher=options.teacher != "none", views=max(1, options.views),
    )  # fmt: skip
