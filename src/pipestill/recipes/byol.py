"""BYOL on scikit-learn's digits: two views of each image, a momentum teacher, no labels.

A workload for schedules so far: on these small images the untrained network's features already tell 97 % of the digits
apart, and training has not been seen to improve on that.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pipestill.errors import ConfigError
from pipestill.losses import byol
from pipestill.model.seeding import derive
from pipestill.model.tasks import Momentum
from pipestill.recipes.datasets import digits
from pipestill.recipes.recipe import OPTIMIZERS, MomentumWorkload, Training, cosine
from pipestill.recipes.soft_target import Convolution


@dataclass(frozen=True)
class Byol:
    """Learn features of scikit-learn's digits from two views of each, without labels (Grill et al. 2020).

    Args:
        width: channels of the encoder's convolutions
        depth: convolutions of the encoder after its first
        projection: outputs of the projector and of the predictor
        hidden: units of their hidden layers
        dropout: share of channels that the student drops
        momentum: m of the teacher at the start; it rises to 1 along a cosine
        batch_size: samples of one update
        epochs: passes over the data
        optimizer: of the student
        lr: learning rate at the start; it falls along a cosine
        sgd_momentum: SGD's and LARS's own momentum
        weight_decay: L2 penalty (SGD, LARS) or decoupled decay (AdamW)
    """

    name: ClassVar[str] = "byol"

    width: int = 16
    depth: int = 3
    projection: int = 32
    hidden: int = 64
    dropout: float = 0.0
    momentum: float = 0.96
    batch_size: int = 128
    epochs: int = 20
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"
    lr: float = 0.1
    sgd_momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}; expected at least {least}"
            for name, least in (
                ("width", 1), ("depth", 2), ("projection", 1), ("hidden", 1), ("batch_size", 2), ("epochs", 1)
            )
            if getattr(self, name) < least
        ]  # fmt: skip
        problems += [
            f"{name} is {getattr(self, name)}; expected 0 or more, and less than 1"
            for name in ("dropout", "momentum")
            if not 0.0 <= getattr(self, name) < 1.0
        ]
        if problems:
            raise ConfigError("; ".join(problems))

    def workload(self, seed: int, num_samples: int | None = None) -> MomentumWorkload:
        """The task, the data (80 % to learn from, 20 % to test on) and how it is trained."""
        train, test = digits(seed)
        seen = train if num_samples is None else TensorDataset(*train[:num_samples])
        loader = DataLoader(seen, batch_size=self.batch_size, shuffle=True, collate_fn=two_views)
        options = {"weight_decay": self.weight_decay}
        if self.optimizer != "adamw":
            options["momentum"] = self.sgd_momentum
        return MomentumWorkload(
            build=lambda: self._task(seed, self.epochs * len(loader)),
            evaluate=lambda encoder: {"knn_accuracy": knn_accuracy(cast(nn.Sequential, encoder), train, test)},
            train_loader=loader,
            student_training=Training(self.epochs, OPTIMIZERS[self.optimizer], self.lr, options, cosine),
        )

    def _task(self, seed: int, total_steps: int) -> Momentum:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "student"))
            channels = [self.width] + [self.width * (2 if i > self.depth // 2 else 1) for i in range(1, self.depth + 1)]
            blocks: list[nn.Module] = [Convolution(1, self.width, 1, self.dropout)]
            for i in range(self.depth):
                blocks.append(Convolution(channels[i], channels[i + 1], 2 if i == self.depth // 2 else 1, self.dropout))
            blocks.append(Perceptron(channels[-1], self.hidden, self.projection, pool=True))
            predictor = Perceptron(self.projection, self.hidden, self.projection, pool=False)
        teacher = nn.Sequential(*copy.deepcopy(blocks))
        return Momentum(
            teacher, nn.Sequential(*blocks, predictor), byol, momentum=Rising(self.momentum, total_steps), views=2
        )


@dataclass(frozen=True)
class Rising:
    """From `start` at the first step to 1 at the last, along half a cosine (BYOL, section 3.3)."""

    start: float
    total_steps: int

    def __call__(self, step: int) -> float:
        return 1.0 - (1.0 - self.start) * 0.5 * (
            1.0 + math.cos(math.pi * min(step, self.total_steps) / self.total_steps)
        )


class Perceptron(nn.Module):
    """One hidden layer with batch norm, without which BYOL collapses: (rows, in) -> (rows, out).

    `pool`: averages (rows, in, h, w) over h and w first.
    """

    def __init__(self, size: int, hidden: int, out: int, pool: bool) -> None:
        super().__init__()
        self.pool = pool
        self.layers = nn.Sequential(nn.Linear(size, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.mean((2, 3)) if self.pool else x)  # type: ignore[no-any-return]


def two_views(samples: list[tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], None]:
    """Two views of each sample, drawn anew each time; labels are not passed on."""
    images = torch.stack([image for image, _ in samples])
    return (augmented(images), augmented(images)), None


def augmented(images: Tensor) -> Tensor:
    """Images (rows, 1, 8, 8) moved by up to one pixel, brighter or darker, with noise."""
    rows = len(images)
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    down, right = torch.randint(0, 3, (rows,)), torch.randint(0, 3, (rows,))
    at_row, at_column = down[:, None] + torch.arange(8), right[:, None] + torch.arange(8)
    moved = padded[torch.arange(rows)[:, None, None], 0, at_row[:, :, None], at_column[:, None, :]].unsqueeze(1)
    contrast = 0.7 + 0.6 * torch.rand(rows, 1, 1, 1)
    return moved * contrast + 0.1 * torch.randn_like(moved)


def knn_accuracy(encoder: nn.Sequential, train: TensorDataset, test: TensorDataset, neighbours: int = 10) -> float:
    """Share of test samples whose nearest training samples agree on their label, by cosine of what the convolutions give
    (the projector is only there to be trained through).
    """

    def features(data: TensorDataset) -> tuple[Tensor, Tensor]:
        images, labels = data.tensors
        return nn.functional.normalize(encoder[:-1](images).flatten(1), dim=-1), labels

    was_training = encoder.training
    encoder.eval()
    with torch.no_grad():
        (known, labels), (asked, truth) = features(train), features(test)
        nearest: Any = (asked @ known.t()).topk(neighbours, dim=1).indices
        votes = nn.functional.one_hot(labels[nearest]).sum(1)
    encoder.train(was_training)
    return float((votes.argmax(1) == truth).double().mean())
