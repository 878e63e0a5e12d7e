"""The cross entropy and the accuracy of tokens with labels, as means over the labels of a whole batch that count."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pipestill.errors import DataError, ModelError
from pipestill.losses.counted import means
from pipestill.losses.logits import logits_of
from pipestill.losses.targets import read_target


@dataclass(frozen=True)
class TokenMean:
    """A mean over the labels of a batch that count; the base of those that ship."""

    ignore_index: int = -100
    """The label of tokens that do not count."""

    def counts(self, target: Any) -> float:
        """How many labels count.

        Args:
            target: class indices, (rows, ...), or a mapping with these as `labels`.
        """
        return float((self._labels(target) != self.ignore_index).sum())

    def sums(self, output: Any, target: Any) -> Tensor:
        """Add up over the labels that count.

        Args:
            output: the logits, (rows, ..., vocabulary), or a mapping with `logits`.
            target: as `counts` takes it.
        """
        raise NotImplementedError

    def __call__(self, output: Any, target: Any) -> Tensor:
        """Compute the mean over the labels that count; 0 where none does.

        Args:
            output: the logits, (rows, ..., vocabulary), or a mapping with `logits`.
            target: as `counts` takes it.
        """
        value = means(self.sums(output, target), self.counts(target))
        assert isinstance(value, Tensor)
        return value

    def _labels(self, target: Any) -> Tensor:
        """The class indices of a target."""
        labels = read_target(target, self.ignore_index).labels
        if labels is None:
            raise DataError(f"the target is a {type(target).__name__}; expected class indices, or a mapping with 'labels'")
        return labels

    def _flat(self, output: Any, target: Any) -> tuple[Tensor, Tensor]:
        """The logits of all tokens, (tokens, vocabulary), and their labels, (tokens,)."""
        logits, labels = logits_of(output), self._labels(target)
        if not isinstance(logits, Tensor):
            raise ModelError(f"{type(self).__name__} takes logits, and got a LinearLogits, which are not computed yet")
        if logits.shape[:-1] != labels.shape:
            raise DataError(
                f"labels are {tuple(labels.shape)}, but the logits are {tuple(logits.shape)}; expected a label for each token"
            )
        return logits.flatten(0, -2), labels.flatten()


@dataclass(frozen=True)
class TokenCrossEntropy(TokenMean):
    """The cross entropy of logits with the labels that count, in float32: a loss without a teacher, and a metric.

    It is the mean over all labels of a batch that count, whatever microbatches it is taken in.

    Args:
        ignore_index: the label of tokens that do not count.
    """

    def sums(self, output: Any, target: Any) -> Tensor:
        """Add up the cross entropies of the labels that count.

        Args:
            output: the logits, (rows, ..., vocabulary), or a mapping with `logits`.
            target: class indices, (rows, ...), or a mapping with these as `labels`.
        """
        logits, labels = self._flat(output, target)
        return F.cross_entropy(logits.float(), labels, ignore_index=self.ignore_index, reduction="sum")


@dataclass(frozen=True)
class TokenAccuracy(TokenMean):
    """The fraction of the labels that count for which the largest logit is theirs.

    Args:
        ignore_index: the label of tokens that do not count.
    """

    def sums(self, output: Any, target: Any) -> Tensor:
        """Count the labels that are right.

        Args:
            output: the logits, (rows, ..., vocabulary), or a mapping with `logits`.
            target: class indices, (rows, ...), or a mapping with these as `labels`.
        """
        logits, labels = self._flat(output, target)
        return ((logits.argmax(-1) == labels) & (labels != self.ignore_index)).double().sum()
