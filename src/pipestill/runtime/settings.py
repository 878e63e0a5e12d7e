"""How to train, besides the plan: what is the same on every rank of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipestill.losses import Metric
from pipestill.model.batchnorm import Norms
from pipestill.optim import OptimizerFactory


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of any training. `lr_factor(step)` multiplies every parameter group's own learning rate."""

    seed: int
    log_every: int
    lr: float
    lr_factor: Callable[[int], float]
    optimizer: OptimizerFactory
    timeout_seconds: float


@dataclass(frozen=True)
class PipelineSettings(TrainingSettings):
    """Settings of training models end to end. `decay_factor(step)` multiplies every parameter group's own weight decay."""

    decay_factor: Callable[[int], float]
    metrics: Mapping[str, Metric]
    validate: bool
    norms: Norms
    largest_norm: float | None
    """Gradients are scaled down to this global norm where theirs is larger; None leaves them as they are."""
