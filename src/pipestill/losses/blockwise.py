"""Losses of (output of a student block, output of its teacher block), for `Blockwise`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipestill.arguments import raise_problems, real_number
from pipestill.losses.signatures import check_shapes


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of what a block gives with what the teacher's gives, of one shape (Pipe-BD's loss of a block)."""
    check_shapes(student, teacher)
    return F.mse_loss(student, teacher)


def normalised_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of |student - teacher|^2 / |teacher|^2: alike for blocks whose outputs differ in scale."""
    check_shapes(student, teacher)
    error, size = ((x.flatten(1).square().sum(1)) for x in (student - teacher, teacher))
    return (error / size.clamp_min(torch.finfo(size.dtype).tiny)).mean()


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of 1 - cosine similarity of all that a row has."""
    check_shapes(student, teacher)
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
        check_shapes(student, teacher)
        t = self.temperature
        return -((teacher / t).softmax(-1) * F.log_softmax(student / t, -1)).sum(-1).mean() * (t * t)
