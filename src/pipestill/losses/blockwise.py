"""Losses of (output of a student block, output of its teacher block), for `ps.Blockwise`."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipestill.arguments import hinted, raise_problems, real_number
from pipestill.losses.signatures import check_shapes


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared error of a student block's output from the teacher block's.

    The loss of a block in Pipe-BD (Jang et al., DATE 2023).

    Args:
        student: the student block's output, (rows, ...).
        teacher: the teacher block's output, of the same shape.
    """
    check_shapes(student, teacher)
    return F.mse_loss(student, teacher)


def normalised_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean over rows of |student - teacher|^2 / |teacher|^2.

    It is alike for blocks whose outputs differ in scale. A row for which the teacher gives zeros (whose squares add up to less
    than the smallest normal number of its type) has no scale: it counts as its mean squared error, as if the mean square of the
    teacher's row were 1.

    Args:
        student: the student block's output, (rows, ...).
        teacher: the teacher block's output, of the same shape.
    """
    check_shapes(student, teacher)
    error, size = ((x.flatten(1).square().sum(1)) for x in (student - teacher, teacher))
    is_zero = size < torch.finfo(size.dtype).tiny
    return (error / size.masked_fill(is_zero, teacher[:1].numel())).mean()


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean over rows of 1 - cosine similarity, each row taken as one vector.

    Args:
        student: the student block's output, (rows, ...).
        teacher: the teacher block's output, of the same shape.
    """
    check_shapes(student, teacher)
    return (1.0 - F.cosine_similarity(student.flatten(1), teacher.flatten(1), dim=-1)).mean()


@hinted
@dataclass(frozen=True)
class SoftCrossEntropy:
    """T^2 times the cross entropy of the student's logits with the teacher's softmax, both softened by a temperature T.

    The loss of the last block in Pipe-BD (Jang et al., DATE 2023). The mean over rows, and over any axes between rows and
    classes.

    Args:
        temperature: T, above 0, by which the logits of both models are divided.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        raise_problems(real_number("temperature", self.temperature, above=0))

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            student: the student's logits, (rows, ..., classes).
            teacher: the teacher's logits, of the same shape.
        """
        check_shapes(student, teacher)
        t = self.temperature
        return -((teacher / t).softmax(-1) * F.log_softmax(student / t, -1)).sum(-1).mean() * (t * t)
