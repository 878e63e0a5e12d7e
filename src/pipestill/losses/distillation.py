"""Losses of (student output, teacher output, target), for `ps.Distillation`."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pipestill.arguments import raise_problems, real_number
from pipestill.losses.signatures import check_shapes


@dataclass(frozen=True)
class SoftTarget:
    """Cross entropy with the labels plus weight * T^2 * KL(teacher || student) of logits softened by a temperature T.

    The mean over rows, and over any axes between rows and classes (Hinton et al. 2015, section 2). The defaults are those of
    TSPipe's distillation benchmark.

    Args:
        temperature: T, above 0, by which the logits of both models are divided.
        weight: the factor of the divergence, at least 0.
    """

    temperature: float = 4.0
    weight: float = 0.1

    def __post_init__(self) -> None:
        raise_problems(
            (*real_number("temperature", self.temperature, above=0), *real_number("weight", self.weight, least=0))
        )

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """Compute the parts `soft_target` and, with labels, `cross_entropy`.

        Args:
            student: the student's logits, (rows, ..., classes).
            teacher: the teacher's logits, of the same shape.
            target: class indices, (rows, ...), or None for the divergence alone.
        """
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
class _Weighted:
    """A loss with a factor."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        raise_problems(real_number("weight", self.weight, least=0))


@dataclass(frozen=True)
class LogitsMSE(_Weighted):
    """The mean squared error of the student's logits from the teacher's (Ba and Caruana 2014, section 2.2).

    Args:
        weight: the factor of the loss, at least 0.
    """

    def __call__(self, student: Tensor, teacher: Tensor, target: object) -> dict[str, Tensor]:
        """Compute the part `logits_mse`.

        Args:
            student: the student's output, of any shape.
            teacher: the teacher's output, of the same shape.
            target: not read.
        """
        check_shapes(student, teacher)
        return {"logits_mse": F.mse_loss(student, teacher) * self.weight}


@dataclass(frozen=True)
class Cosine(_Weighted):
    """The mean of 1 - cosine similarity of the two models' features.

    Args:
        weight: the factor of the loss, at least 0.
    """

    def __call__(self, student: Tensor, teacher: Tensor, target: object) -> dict[str, Tensor]:
        """Compute the part `cosine`.

        Args:
            student: the student's output, (..., features); the similarity is that of the last axis.
            teacher: the teacher's output, of the same shape.
            target: not read.
        """
        check_shapes(student, teacher)
        return {"cosine": (1.0 - F.cosine_similarity(student, teacher, dim=-1)).mean() * self.weight}
