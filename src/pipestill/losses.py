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
from torch import Tensor, nn

from pipestill.arguments import raise_problems, real_number
from pipestill.errors import ConfigError

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
        raise_problems(
            (*real_number("temperature", self.temperature, above=0), *real_number("weight", self.weight, least=0))
        )

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

    def __post_init__(self) -> None:
        raise_problems(real_number("weight", self.weight, least=0))

    def __call__(self, student: Tensor, teacher: Tensor, target: object) -> dict[str, Tensor]:
        _check_shapes(student, teacher)
        return {"logits_mse": F.mse_loss(student, teacher) * self.weight}


@dataclass(frozen=True)
class Cosine:
    """`weight` * mean of 1 - cosine similarity along the last axis. Outputs (..., features) of one shape."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        raise_problems(real_number("weight", self.weight, least=0))

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


@dataclass(frozen=True)
class MaskedDistillation:
    """Of masked language models: `soft_target` * T^2 * KL(teacher || student) of logits softened by temperature T, +
    `cross_entropy` with the masked tokens + `cosine` * (1 - cosine similarity of the last hidden states).

    Outputs are dicts of `logits` (rows, length, vocabulary) and `last_hidden_state` (rows, length, features). The target is
    a dict of `labels` (rows, length) and of two weights of the same shape: `masked`, of each token in the cross entropy, and
    `tokens`, in the other two. Each part is the mean over rows of the weighted sum over tokens: with weights of rows /
    tokens, the mean over the batch's tokens, however the batch is cut (Sanh et al. 2019, DistilBERT, section 3; weights 5, 2
    and 1 and T 2 as in its released training, which counts padding in none of the three).
    """

    temperature: float = 2.0
    soft_target: float = 5.0
    cross_entropy: float = 2.0
    cosine: float = 1.0

    def __post_init__(self) -> None:
        weights = (self.soft_target, self.cross_entropy, self.cosine)
        raise_problems(p for name, value in vars(self).items() for p in real_number(name, value))
        if self.temperature <= 0 or min(weights) < 0 or max(weights) == 0:
            raise ConfigError(
                f"temperature {self.temperature} and weights {weights}; expected > 0, and weights >= 0 that are not all 0"
            )

    def __call__(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], target: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        hidden, taught = student["last_hidden_state"], teacher["last_hidden_state"]
        _check_shapes(student["logits"], teacher["logits"])
        parts, t = {}, self.temperature
        if self.soft_target:
            ours, theirs = (F.log_softmax(output["logits"] / t, -1) for output in (student, teacher))
            divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
            parts["soft_target"] = _weighted(divergence, target["tokens"]) * (self.soft_target * t * t)
        if self.cross_entropy:
            parts["cross_entropy"] = masked_cross_entropy(student, target)["cross_entropy"] * self.cross_entropy
        if self.cosine:
            _check_shapes(hidden, taught)
            apart = 1.0 - F.cosine_similarity(hidden, taught, dim=-1)
            parts["cosine"] = _weighted(apart, target["tokens"]) * self.cosine
        return parts


def masked_cross_entropy(output: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cross entropy of `logits` with the masked tokens: outputs and targets as in `MaskedDistillation`."""
    logits = output["logits"]
    each = F.cross_entropy(logits.flatten(0, 1), target["labels"].flatten(), reduction="none")
    return {"cross_entropy": _weighted(each.view_as(target["masked"]), target["masked"])}


def masked_accuracy(output: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
    """Share of the masked tokens whose largest logit is theirs: outputs and targets as in `MaskedDistillation`."""
    right = output["logits"].argmax(-1) == target["labels"]
    return _weighted(right.double(), target["masked"])


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """The mean over rows of the weighted sum of values (rows, length)."""
    return (values * weights).sum(-1).mean()


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

    def __post_init__(self) -> None:
        raise_problems(real_number("temperature", self.temperature, above=0))

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], target: object) -> dict[str, Tensor]:
        t, terms = self.temperature, []
        for i, s in enumerate(student):
            for j, key in enumerate(teacher):
                if i != j:
                    logits = F.normalize(s, dim=-1) @ F.normalize(key, dim=-1).t() / t
                    terms.append(F.cross_entropy(logits, torch.arange(len(logits), device=logits.device)) * (2 * t))
        return {"info_nce": torch.stack(terms).sum()}


class Dino(nn.Module):
    """Cross entropy of the student's view i with the teacher's view j, the mean over all pairs of different views and rows.

    Outputs (rows, dim) a view. The teacher's are sharpened by a temperature that rises evenly from the first to the second of
    `teacher_temperatures` over `warm_up_batches`, once `center` is taken from them: their mean, moved by 1 -
    `center_momentum` towards that of each batch after its loss. So it is of batches: use it with `batch_loss=True`. Both
    the center and the number of batches are buffers (Caron et al. 2021, DINO, algorithm 1).
    """

    def __init__(
        self,
        dim: int,
        *,
        student_temperature: float = 0.1,
        teacher_temperatures: tuple[float, float] = (0.04, 0.07),
        warm_up_batches: int = 0,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if min(student_temperature, *teacher_temperatures) <= 0 or not 0 <= center_momentum < 1 or warm_up_batches < 0:
            raise ConfigError(
                f"student_temperature {student_temperature}, teacher_temperatures {teacher_temperatures}, center_momentum "
                f"{center_momentum} and warm_up_batches {warm_up_batches}; expected > 0, > 0, 0 to below 1, and >= 0"
            )
        self.student_temperature, self.teacher_temperatures = student_temperature, teacher_temperatures
        self.warm_up_batches, self.center_momentum = warm_up_batches, center_momentum
        self.register_buffer("center", torch.zeros(dim))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.center: Tensor
        self.batches: Tensor

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], target: object) -> dict[str, Tensor]:
        learnt = [F.log_softmax(view / self.student_temperature, -1) for view in student]
        with torch.no_grad():
            taught = [((view - self.center) / self.teacher_temperature()).softmax(-1) for view in teacher]
        terms = [-(t * s).sum(-1).mean() for j, t in enumerate(taught) for i, s in enumerate(learnt) if i != j]
        if self.training:
            with torch.no_grad():
                self.center.lerp_(torch.cat(list(teacher)).mean(0), 1.0 - self.center_momentum)
                self.batches.add_(1)
        return {"dino": torch.stack(terms).mean()}

    def teacher_temperature(self) -> Tensor:
        """Of the next batch."""
        first, last = self.teacher_temperatures
        done = (self.batches / max(1, self.warm_up_batches)).clamp(max=1.0) if self.warm_up_batches else 1.0
        return torch.as_tensor(first + (last - first) * done, device=self.center.device)


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
        raise_problems(real_number("temperature", self.temperature, above=0))

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        _check_shapes(student, teacher)
        t = self.temperature
        return -((teacher / t).softmax(-1) * F.log_softmax(student / t, -1)).sum(-1).mean() * (t * t)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of rows whose largest logit (rows, classes) is the label (rows,)."""
    return (output.argmax(-1) == target).double().mean()
