"""How to train, besides the plan: what is the same on every rank of a run."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipestill.losses import Metric
from pipestill.model.batchnorm import Norms
from pipestill.optim import OptimizerFactory, Schedules


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of any training."""

    seed: int
    log_every: int
    optimizer: OptimizerFactory
    schedules: Schedules
    """Set the learning rates and weight decays of every optimizer for each step."""
    timeout_seconds: float


@dataclass(frozen=True)
class PipelineSettings(TrainingSettings):
    """Settings of training models end to end."""

    metrics: Mapping[str, Metric]
    validate: bool
    norms: Norms
    largest_norm: float | None
    """Gradients are scaled down to this global norm where theirs is larger; None leaves them as they are."""
