"""How much features tell of labels that they were learnt without: nearest neighbours and a linear probe."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from pipestill.errors import ConfigError
from pipestill.recipes.images import Collate, Images
from pipestill.recipes.packages import needed

MOST = 10_000
"""Samples of each half of the data that are looked at: of more, evenly many from all parts."""


@dataclass(frozen=True)
class FeatureQuality:
    """Measures how much a network's features of images tell of their labels, on images that are kept for the test.

    `represent(network)` maps images (rows, channels, size, size) to features (rows, dim). `knn_accuracy`: share of test
    samples whose `neighbours` nearest training samples by cosine have their label more often than any other.
    `linear_accuracy`: share that a logistic regression on the training samples' features gets right, each feature brought to
    mean 0 and deviation 1 first. Nothing is augmented; at most `MOST` samples of each half are looked at.
    """

    images: Images
    represent: Callable[[Any], Callable[[Tensor], Tensor]]
    neighbours: int = 10
    batch_size: int = 256
    workers: int = 0

    def __call__(self, network: nn.Module, device: torch.device) -> dict[str, float]:
        """Compute the metrics on `device`; the network is left on the CPU, in the mode that it had."""
        was_training = network.training
        network.to(device).eval()
        with torch.no_grad():
            known, labels = self._features(network, self.images.train, device)
            asked, truth = self._features(network, self.images.test, device)
        network.to("cpu").train(was_training)
        return {
            "knn_accuracy": knn_accuracy(known, labels, asked, truth, self.neighbours),
            "linear_accuracy": linear_accuracy(known, labels, asked, truth),
        }

    def _features(self, network: nn.Module, data: Dataset[Any], device: torch.device) -> tuple[Tensor, Tensor]:
        loader = DataLoader(
            evenly(data, MOST), batch_size=self.batch_size, collate_fn=Collate(self.images.channels), num_workers=self.workers,
            multiprocessing_context="forkserver" if self.workers else None,
        )  # fmt: skip
        represent = self.represent(network)
        features, labels = zip(*((represent(x.to(device)).float().cpu(), y) for x, y in loader), strict=True)
        return torch.cat(features), torch.cat(labels)


def evenly(data: Dataset[Any], most: int) -> Dataset[Any]:
    """Take all samples, or every so many of more than `most`: those of a folder lie sorted by class."""
    count = len(data)  # type: ignore[arg-type]
    return data if count <= most else Subset(data, range(0, count, math.ceil(count / most)))


def knn_accuracy(known: Tensor, labels: Tensor, asked: Tensor, truth: Tensor, neighbours: int) -> float:
    """Compute how often the nearest neighbours by cosine of features (rows, dim) have most often the right label (rows,)."""
    known, asked = (F.normalize(features, dim=-1) for features in (known, asked))
    nearest = (asked @ known.t()).topk(min(neighbours, len(known)), dim=1).indices
    votes = F.one_hot(labels[nearest], int(labels.max()) + 1).sum(1)
    return float((votes.argmax(1) == truth).double().mean())


def linear_accuracy(known: Tensor, labels: Tensor, asked: Tensor, truth: Tensor) -> float:
    """Compute how often scikit-learn's logistic regression on features (rows, dim), with its usual penalty, is right."""
    models = needed("sklearn.linear_model", "the linear probe is scikit-learn's", "scikit-learn")
    if len(labels.unique()) < 2:
        raise ConfigError("the training data has one class only; a linear probe needs two, so pass data with more")
    mean, deviation = known.mean(0), known.std(0).clamp_min(1e-6)
    known, asked = ((features - mean) / deviation for features in (known, asked))
    probe = models.LogisticRegression(max_iter=1_000).fit(known.numpy(), labels.numpy())
    return float(probe.score(asked.numpy(), truth.numpy()))
