"""The loss of (output, target) of a classifier without a teacher, for `Supervised`, and its metric."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Cross entropy of logits (rows, classes) with class indices (rows,): the loss of a model without a teacher."""
    return {"cross_entropy": F.cross_entropy(output, target)}


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of rows whose largest logit (rows, classes) is the label (rows,)."""
    return (output.argmax(-1) == target).double().mean()
