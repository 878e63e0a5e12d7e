"""Losses and metrics: functions of (student output, teacher output, target) and of (output, target).

A loss returns the mean over the rows that it is given, as a scalar or as a dict of scalars whose sum is the loss
and whose names are logged. Any callable of that form is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LossValue = Tensor | Mapping[str, Tensor]
DistillationLoss = Callable[[Any, Any, Any], LossValue]
MomentumLoss = Callable[[Sequence[Any], Sequence[Any], Any], LossValue]
SupervisedLoss = Callable[[Any, Any], LossValue]
BlockLoss = Callable[[Any, Any], Tensor]
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


def byol(student: Sequence[Tensor], teacher: Sequence[Tensor], target: object) -> dict[str, Tensor]:
    """Sum of 2 - 2 cosine(student's view i, teacher's view j) over all pairs of different views, the mean over rows.

    Outputs (rows, dim) a view (Grill et al. 2020, equation 2, in both directions).
    """
    pairs = [(s, t) for i, s in enumerate(student) for j, t in enumerate(teacher) if i != j]
    terms = [(2.0 - 2.0 * F.cosine_similarity(s, t, dim=-1)).mean() for s, t in pairs]
    return {"byol": torch.stack(terms).sum()}


@dataclass(frozen=True)
class InfoNCE:
    """2 T times the cross entropy of telling each sample's other view from those of all other samples, at temperature T.

    Outputs (rows, dim) a view; the negatives are the rest of what it is given, so use it with `batch_loss=True` (Chen et al.
    2021, MoCo v3, algorithm 1).
    """

    temperature: float = 0.2

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], target: object) -> dict[str, Tensor]:
        t, terms = self.temperature, []
        for i, s in enumerate(student):
            for j, key in enumerate(teacher):
                if i != j:
                    logits = F.normalize(s, dim=-1) @ F.normalize(key, dim=-1).t() / t
                    terms.append(F.cross_entropy(logits, torch.arange(len(logits), device=logits.device)) * (2 * t))
        return {"info_nce": torch.stack(terms).sum()}


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of what a block gives with what the teacher's gives, of one shape (Pipe-BD's loss of a block)."""
    _check_shapes(student, teacher)
    return F.mse_loss(student, teacher)


def normalised_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of |student - teacher|^2 / |teacher|^2: alike for blocks whose outputs differ in scale."""
    _check_shapes(student, teacher)
    error, size = ((x.flatten(1).square().sum(1)) for x in (student - teacher, teacher))
    return (error / size.clamp_min(torch.finfo(size.dtype).tiny)).mean()


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of 1 - cosine similarity of all that a row has."""
    _check_shapes(student, teacher)
    return (1.0 - F.cosine_similarity(student.flatten(1), teacher.flatten(1), dim=-1)).mean()


@dataclass(frozen=True)
class SoftCrossEntropy:
    """T^2 times the cross entropy of the student's logits with the teacher's softmax, both softened by temperature T.

    Outputs (rows, ..., classes) of one shape; the loss of the last block in Pipe-BD.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature}; expected > 0")

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        _check_shapes(student, teacher)
        t = self.temperature
        return -((teacher / t).softmax(-1) * F.log_softmax(student / t, -1)).sum(-1).mean() * (t * t)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of rows whose largest logit (rows, classes) is the label (rows,)."""
    return (output.argmax(-1) == target).double().mean()
