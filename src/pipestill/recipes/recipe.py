"""What a recipe is: a frozen dataclass of options that builds a `Workload`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader

from pipestill.losses import DistillationLoss, Metric, SupervisedLoss
from pipestill.model.tasks import Distillation, Momentum
from pipestill.optim import LARS

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "lars": LARS,
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """How one model is trained. `lr_schedule(total_steps)` gives a factor per step."""

    epochs: int
    optimizer: type[torch.optim.Optimizer]
    lr: float
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    lr_schedule: Callable[[int], Callable[[int], float]] | None = None

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of some of the model's parameters."""
        made: Callable[..., torch.optim.Optimizer] = self.optimizer
        return made(parameters, lr=self.lr, **self.optimizer_options)

    def factor(self, loader: Sized) -> Callable[[int], float] | None:
        """The rate's factor per step for training on `loader`."""
        return self.lr_schedule(self.epochs * len(loader)) if self.lr_schedule else None


@dataclass(frozen=True)
class Workload:
    """Everything that distilling one student takes. Builders give freshly initialised models, the same every time."""

    build_teacher: Callable[[], nn.Module]
    build_student: Callable[[], nn.Module]
    loss: DistillationLoss
    supervised_loss: SupervisedLoss
    metrics: Mapping[str, Metric]
    train_loader: DataLoader[Any]
    validation_loader: DataLoader[Any]
    teacher_training: Training
    student_training: Training

    def task(self) -> Distillation:
        """What a schedule runs: the distillation, of fresh models."""
        return Distillation(self.build_teacher(), self.build_student(), self.loss)


@dataclass(frozen=True)
class MomentumWorkload:
    """Everything that training with a momentum teacher takes.

    `build()` gives a fresh task, the same every time. `evaluate(encoder)` gives metrics of what has been learnt, by data with
    labels that training never sees; the encoder is the teacher, or the same network untrained.
    """

    build: Callable[[], Momentum]
    evaluate: Callable[[nn.Module], dict[str, float]]
    train_loader: DataLoader[Any]
    student_training: Training
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    def task(self) -> Momentum:
        """What a schedule runs."""
        return self.build()


AnyWorkload = Workload | MomentumWorkload


class Recipe(Protocol):
    """A frozen dataclass whose fields are the options on the command line."""

    name: ClassVar[str]

    def workload(self, seed: int, num_samples: int | None = None) -> AnyWorkload:
        """Build it; `num_samples` keeps only the first training samples."""


def cosine(total_steps: int) -> Callable[[int], float]:
    """From 1 at the first step down to 0 after the last, along half a cosine."""

    def factor(step: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * min(step, total_steps) / total_steps))

    return factor
