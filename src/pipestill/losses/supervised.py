"""Functions of (output, target): the loss of a classifier without a teacher, and metrics of validation data."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from pipestill.losses.distillation import weighted_mean


def cross_entropy(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Compute the cross entropy of logits with class indices, the mean over rows.

    Args:
        output: the logits, (rows, classes).
        target: class indices, (rows,).
    """
    return {"cross_entropy": F.cross_entropy(output, target)}


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Compute the fraction of rows whose largest logit is that of their label.

    Args:
        output: the logits, (rows, classes).
        target: class indices, (rows,).
    """
    return (output.argmax(-1) == target).double().mean()


def masked_accuracy(output: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
    """Compute the fraction of the masked tokens whose largest logit is that of the original token.

    Args:
        output: the model's `logits`, (rows, length, vocabulary).
        target: `labels`, (rows, length), and the weights `masked`, of that shape, as in `ps.losses.MaskedDistillation`.
    """
    right = output["logits"].argmax(-1) == target["labels"]
    return weighted_mean(right.double(), target["masked"])
