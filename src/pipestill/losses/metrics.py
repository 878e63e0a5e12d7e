"""Metrics of (output, target): means over the labels of the validation data that count, of classes or of tokens.

A metric is a function that gives the mean over the rows that it gets. One that is a mean over something else has the methods of a
loss that counts: `counts(target)`, a number, and `sums(output, target)`. It may have `of_mean`, which makes its value of the mean
over all of the data.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipestill.arguments import raise_problems, whole
from pipestill.errors import ModelError
from pipestill.losses.logits import Logits, logits_of
from pipestill.losses.sources import Source, head_of, tensors_of
from pipestill.losses.supervised import CrossEntropy
from pipestill.losses.targets import IGNORED, checked_labels, labels_of

_CHUNK = 1024
"""For how many tokens logits are looked at at a time."""


@dataclass(frozen=True)
class _OverLabels(ABC):
    """A metric that is a mean over labels."""

    ignore_index: int = IGNORED

    def __post_init__(self) -> None:
        raise_problems(whole("ignore_index", self.ignore_index))

    def counts(self, target: Any) -> float:
        """Count the labels.

        Args:
            target: class indices, (rows, ...), or a mapping with these as `labels`.
        """
        return float(labels_of(target, self.ignore_index).counted.sum())

    @abstractmethod
    def sums(self, output: Any, target: Any) -> Tensor:
        """Add up over the labels.

        Args:
            output: as for a call.
            target: as for a call.
        """

    def _mean(self, output: Any, target: Any) -> Tensor:
        return self.sums(output, target) / max(1.0, self.counts(target))


@dataclass(frozen=True)
class Accuracy(_OverLabels):
    """The fraction of labels whose logit is the largest.

    Args:
        ignore_index: the label of what does not count.
    """

    def sums(self, output: Any, target: Any) -> Tensor:
        """Count the labels whose logit is the largest.

        Args:
            output: as for a call.
            target: as for a call.
        """
        logits = logits_of(output)
        labels, weights = checked_labels(
            labels_of(target, self.ignore_index), logits.shape[:-1], logits.shape[-1], self.ignore_index
        )
        largest = _largest(logits)
        return ((largest == labels.to(largest.device)) * weights.to(largest.device)).sum()

    def __call__(self, output: Any, target: Any) -> Tensor:
        """Compute the fraction, 0 where there are no labels.

        Args:
            output: the logits, (rows, ..., classes), or a mapping with `logits`; or either as a `ps.losses.LinearLogits`.
            target: class indices, (rows, ...), or a mapping with these as `labels`.
        """
        return self._mean(output, target)


@dataclass(frozen=True)
class Perplexity(_OverLabels):
    """The exponential of the cross entropy with labels, averaged over all of the data first.

    Args:
        ignore_index: the label of what does not count.
    """

    def sums(self, output: Any, target: Any) -> Tensor:
        """Add up the cross entropies.

        Args:
            output: as for a call.
            target: as for a call.
        """
        return CrossEntropy(self.ignore_index).sums(output, target)["cross_entropy"].double()

    def of_mean(self, mean: float) -> float:
        """The perplexity of data whose mean cross entropy is known.

        Args:
            mean: the mean cross entropy over all labels, in nats.
        """
        return math.exp(min(mean, 700.0))

    def __call__(self, output: Any, target: Any) -> Tensor:
        """Compute the perplexity.

        Args:
            output: the logits, (rows, ..., classes), or a mapping with `logits`; or either as a `ps.losses.LinearLogits`.
            target: class indices, (rows, ...), or a mapping with these as `labels`.
        """
        return torch.tensor(self.of_mean(float(self._mean(output, target))), dtype=torch.float64)


@dataclass(frozen=True)
class Agreement(_OverLabels):
    """The fraction of labelled tokens for which two models have the same largest logit.

    Args:
        ignore_index: the label of what does not count.
    """

    def sums(self, output: Any, target: Any) -> Tensor:
        """Count the tokens for which the two agree.

        Args:
            output: as for a call.
            target: as for a call.
        """
        if not isinstance(output, (tuple, list)) or len(output) != 2:
            raise ModelError(f"agreement got {type(output).__name__}; expected the outputs of two models, (student's, teacher's)")
        student, teacher = map(logits_of, output)
        _, weights = checked_labels(
            labels_of(target, self.ignore_index), student.shape[:-1], student.shape[-1], self.ignore_index
        )
        same = _largest(student) == _largest(teacher)
        return (same * weights.to(same.device)).sum()

    def __call__(self, output: Any, target: Any) -> Tensor:
        """Compute the fraction, 0 where there are no labels.

        Args:
            output: the outputs of two models, a pair of what other metrics take.
            target: class indices, (rows, ...), or a mapping with these as `labels`.
        """
        return self._mean(output, target)


def _largest(logits: Logits) -> Tensor:
    """The index of each token's largest logit, (tokens,)."""

    def chunks() -> Iterator[Tensor]:
        source = Source(head_of(logits), tensors_of(logits), (False, False, False), logits.shape[-1])
        for start in range(0, logits.shape[:-1].numel(), _CHUNK):
            yield source.logits(slice(start, start + _CHUNK)).argmax(-1)

    with torch.no_grad():
        found = list(chunks())
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


accuracy = Accuracy()
"""The fraction of labels other than -100 whose logit is the largest."""
perplexity = Perplexity()
"""The exponential of the cross entropy with labels other than -100."""
agreement = Agreement()
"""The fraction of tokens with a label other than -100 for which two models have the same largest logit."""
