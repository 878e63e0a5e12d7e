"""Soft-target distillation of a CNN on scikit-learn's digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pipestill.errors import ConfigError
from pipestill.losses import SoftTarget as SoftTargetLoss
from pipestill.losses import accuracy, cross_entropy
from pipestill.model.seeding import derive
from pipestill.recipes.datasets import digits
from pipestill.recipes.recipe import OPTIMIZERS, Training, Workload, cosine

CLASSES = 10


@dataclass(frozen=True)
class SoftTarget:
    """Distil a CNN into a much smaller one on scikit-learn's digits.

    Args:
        teacher_width: channels of the teacher's convolutions
        teacher_depth: convolutions of the teacher after its first
        student_width: channels of the student's convolutions
        student_depth: convolutions of the student after its first
        dropout: share of channels that the student drops while it trains
        temperature: T that softens both models' logits
        weight: of the soft-target term beside the cross entropy
        batch_size: samples of one update
        epochs: passes over the data for the student, with and without a teacher
        teacher_epochs: passes over the data for the teacher
        optimizer: of both models
        lr: learning rate of the student at its start; it falls along a cosine
        teacher_lr: learning rate of the teacher at its start
        sgd_momentum: SGD's own momentum
        weight_decay: L2 penalty (SGD) or decoupled decay (AdamW)
    """

    name: ClassVar[str] = "soft-target"

    teacher_width: int = 32
    teacher_depth: int = 4
    student_width: int = 3
    student_depth: int = 3
    dropout: float = 0.0
    temperature: float = 4.0
    weight: float = 1.0
    batch_size: int = 64
    epochs: int = 10
    teacher_epochs: int = 12
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    teacher_lr: float = 0.05
    sgd_momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}; expected at least 1"
            for name in ("teacher_width", "student_width", "batch_size", "epochs", "teacher_epochs")
            if getattr(self, name) < 1
        ]
        problems += [
            f"{name} is {getattr(self, name)}; expected at least 2"
            for name in ("teacher_depth", "student_depth")
            if getattr(self, name) < 2
        ]
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"dropout is {self.dropout}; expected 0 or more, and less than 1")
        if problems:
            raise ConfigError("; ".join(problems))

    def workload(self, seed: int, num_samples: int | None = None) -> Workload:
        """The models, the data (80 % to train on, 20 % to test on) and how they are trained."""
        train, test = digits(seed)
        if num_samples is not None:
            train = TensorDataset(*train[:num_samples])
        return Workload(
            build_teacher=lambda: cnn(self.teacher_width, self.teacher_depth, 0.0, derive(seed, "teacher")),
            build_student=lambda: cnn(self.student_width, self.student_depth, self.dropout, derive(seed, "student")),
            loss=SoftTargetLoss(self.temperature, self.weight),
            supervised_loss=cross_entropy,
            metrics={"accuracy": accuracy},
            train_loader=DataLoader(train, batch_size=self.batch_size, shuffle=True),
            validation_loader=DataLoader(test, batch_size=256),
            teacher_training=self._training(self.teacher_epochs, self.teacher_lr),
            student_training=self._training(self.epochs, self.lr),
        )

    def _training(self, epochs: int, lr: float) -> Training:
        options = {"weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            options["momentum"] = self.sgd_momentum
        return Training(epochs, OPTIMIZERS[self.optimizer], lr, options, cosine)


class Convolution(nn.Module):
    """3x3 convolution, batch norm, ReLU and dropout: (rows, in, h, w) -> (rows, out, h / stride, w / stride)."""

    def __init__(self, channels_in: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.relu(self.norm(self.convolution(x))))  # type: ignore[no-any-return]


class Head(nn.Module):
    """Average over the image, then a linear layer: (rows, channels, h, w) -> (rows, classes)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def cnn(width: int, depth: int, dropout: float, seed: int) -> nn.Sequential:
    """A first convolution, `depth` more (the middle one halves the image and doubles the channels) and a head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks: list[nn.Module] = [Convolution(1, width, 1, dropout)]
        channels = width
        for i in range(depth):
            halves = i == depth // 2
            blocks.append(Convolution(channels, channels * 2 if halves else channels, 2 if halves else 1, dropout))
            channels *= 2 if halves else 1
        return nn.Sequential(*blocks, Head(channels))
