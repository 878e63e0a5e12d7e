"""Losses of (student output, teacher output, target), for `Distillation`."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pipestill.arguments import raise_problems, real_number
from pipestill.losses.signatures import check_shapes


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
        check_shapes(student, teacher)
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
        check_shapes(student, teacher)
        return {"logits_mse": F.mse_loss(student, teacher) * self.weight}


@dataclass(frozen=True)
class Cosine:
    """`weight` * mean of 1 - cosine similarity along the last axis. Outputs (..., features) of one shape."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        raise_problems(real_number("weight", self.weight, least=0))

    def __call__(self, student: Tensor, teacher: Tensor, target: object) -> dict[str, Tensor]:
        check_shapes(student, teacher)
        return {"cosine": (1.0 - F.cosine_similarity(student, teacher, dim=-1)).mean() * self.weight}
