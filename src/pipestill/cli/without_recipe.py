"""Costs without a recipe: uniform stages or a file, and the shape of the task that they are of."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from pipestill.costs import Costs
from pipestill.errors import ConfigError
from pipestill.schedule.pipeline.structure import Demands


class TaskShape(Protocol):
    """What a task without a recipe is described by."""

    @property
    def devices(self) -> int: ...
    @property
    def teacher(self) -> str: ...
    @property
    def views(self) -> int: ...
    @property
    def batch_loss(self) -> bool: ...
    @property
    def clip(self) -> bool: ...


def demands_of(costs: Costs, options: TaskShape) -> tuple[Costs, Demands]:
    """The costs of a task of that shape, and what it asks of a schedule; `ConfigError` when the costs are of another."""
    if options.views < 1:
        raise ConfigError(f"views is {options.views}; expected at least 1")
    if options.teacher == "ema" and not costs.teacher:
        raise ConfigError("--teacher ema needs costs of a teacher, and these have none")
    if len(costs.views) != options.views:
        raise ConfigError(f"the costs are of {len(costs.views)} views, --views is {options.views}")
    if options.teacher == "none":
        costs = dataclasses.replace(costs, teacher=())
    return costs, Demands(options.teacher == "ema", options.views, options.views, options.batch_loss, options.clip)


def uniform(times: str, options: TaskShape) -> Costs:
    """Costs of one block for each stage, all alike, from T,F,BI,BW."""
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
