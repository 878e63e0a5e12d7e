"""Losses of (output, target), for a classifier or a language model without a teacher."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipestill.arguments import raise_problems, whole
from pipestill.losses.chunks import Work, sums_of
from pipestill.losses.counted import means
from pipestill.losses.divergences import forward_kl
from pipestill.losses.logits import logits_of
from pipestill.losses.signatures import LossValue
from pipestill.losses.targets import IGNORED, checked_labels, labels_of


@dataclass(frozen=True)
class CrossEntropy:
    """The cross entropy of logits with labels, the part `cross_entropy`: the mean over all labels of a batch that count.

    Args:
        ignore_index: the label of what does not count.
    """

    ignore_index: int = IGNORED

    def __post_init__(self) -> None:
        raise_problems(whole("ignore_index", self.ignore_index))

    def counts(self, target: Any) -> dict[str, float]:
        """Count the labels.

        Args:
            target: class indices, (rows, ...), or a mapping with these as `labels`.
        """
        return {"cross_entropy": float(labels_of(target, self.ignore_index).counted.sum())}

    def sums(self, output: Any, target: Any) -> dict[str, Tensor]:
        """Compute the part `cross_entropy` as a sum over the labels.

        Args:
            output: the logits, (rows, ..., classes), or a mapping with `logits`; or either as a `ps.losses.LinearLogits`.
            target: class indices, (rows, ...), or a mapping with these as `labels`.
        """
        logits = logits_of(output)
        lead, classes = logits.shape[:-1], logits.shape[-1]
        labels, weights = checked_labels(labels_of(target, self.ignore_index), lead, classes, self.ignore_index)
        device = (logits if isinstance(logits, Tensor) else logits.hidden).device
        weights = weights.to(device)
        work = Work(
            forward_kl, 1.0, torch.zeros_like(weights), 0.0, labels.to(device), weights, 1.0, vocabulary=classes, chunk_size=None
        )
        return {"cross_entropy": sums_of(work, logits, logits)[1]}  # the divergence, of factor 0, is of nothing

    def __call__(self, output: Any, target: Any) -> LossValue:
        """Compute the part `cross_entropy` as a mean over the labels, 0 where there are none.

        Args:
            output: the logits, (rows, ..., classes), or a mapping with `logits`; or either as a `ps.losses.LinearLogits`.
            target: class indices, (rows, ...), or a mapping with these as `labels`.
        """
        return means(self.sums(output, target), self.counts(target))


cross_entropy = CrossEntropy()
"""The cross entropy with labels other than -100."""
