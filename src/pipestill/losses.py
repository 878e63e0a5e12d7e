"""Losses and metrics: functions of (student output, teacher output, target) and of (output, target).

A loss returns the mean over the rows that it is given, as a scalar or as a dict of scalars whose sum is the loss
and whose names are logged. Any callable of that form is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

LossValue = Tensor | Mapping[str, Tensor]
DistillationLoss = Callable[[Any, Any, Any], LossValue]
SupervisedLoss = Callable[[Any, Any], LossValue]
Metric = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class SoftTarget:
    """Cross entropy with the labels plus `weight` * T^2 * KL(teacher || student) of logits softened by `temperature` T.

    Outputs (rows, ..., classes), labels (rows, ...) of class indices, or None for the KL part alone (Hinton et al.
    2015, section 2; TSPipe's KD benchmark has T 4 and weight 0.1).
    """

    temperature: float = 4.0
    weight: float = 0.1

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.weight < 0:
            raise ValueError(f"temperature {self.temperature} and weight {self.weight}; expected > 0 and >= 0")

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        _check_shapes(student, teacher)
        classes = student.shape[-1]
        student, teacher = student.reshape(-1, classes), teacher.reshape(-1, teacher.shape[-1])
        t = self.temperature
        divergence = F.kl_div(
            F.log_softmax(student / t, -1), F.log_softmax(teacher / t, -1), reduction="batchmean", log_target=True
        )
        parts = {"soft_target": divergence * (self.weight * t * t)}
        if target is not None:
            parts["cross_entropy"] = F.cross_entropy(student, target.reshape(-1))
        return parts


@dataclass(frozen=True)
class LogitsMSE:
    """`weight` * mean squared error of the logits (Ba and Caruana 2014, section 2.2). Outputs of one shape."""

    weight: float = 1.0

    def __call__(self, student: Tensor, teacher: Tensor, target: object) -> dict[str, Tensor]:
        _check_shapes(student, teacher)
        return {"logits_mse": F.mse_loss(student, teacher) * self.weight}


@dataclass(frozen=True)
class Cosine:
    """`weight` * mean of 1 - cosine similarity along the last axis. Outputs (..., features) of one shape."""

    weight: float = 1.0

    def __call__(self, student: Tensor, teacher: Tensor, target: object) -> dict[str, Tensor]:
        _check_shapes(student, teacher)
        return {"cosine": (1.0 - F.cosine_similarity(student, teacher, dim=-1)).mean() * self.weight}


def _check_shapes(student: Tensor, teacher: Tensor) -> None:
    """Before anything is broadcast: a loss would then come out all the same."""
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")


def cross_entropy(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Cross entropy of logits (rows, classes) with class indices (rows,): the loss of a model without a teacher."""
    return {"cross_entropy": F.cross_entropy(output, target)}


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of rows whose largest logit (rows, classes) is the label (rows,)."""
    return (output.argmax(-1) == target).double().mean()
