"""The loss of (output, target) of a classifier without a teacher, for `ps.Supervised`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Compute the cross entropy of logits with class indices, the mean over rows.

    Args:
        output: the logits, (rows, classes).
        target: class indices, (rows,).
    """
    return {"cross_entropy": F.cross_entropy(output, target)}
