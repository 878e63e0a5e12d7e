"""BYOL: two views of each image, a momentum teacher, no labels."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from pipestill.errors import ConfigError
from pipestill.losses import byol
from pipestill.lr_schedules import cosine
from pipestill.model.seeding import derive
from pipestill.model.tasks import Momentum
from pipestill.recipes.augment import Photographs, Scans, View, view_loader
from pipestill.recipes.datasets import Images
from pipestill.recipes.evaluate_features import FeatureQuality
from pipestill.recipes.momentum import MomentumWorkload
from pipestill.recipes.networks import RESNETS, network
from pipestill.recipes.recipe import filled
from pipestill.recipes.self_supervised import (
    Chain,
    Perceptron,
    encoder_of,
    images_of,
    problems_of,
    rising,
    seeded,
    training_of,
)
from pipestill.recipes.soft_target import Convolution
from pipestill.recipes.training import warmed_up

_PUBLISHED: dict[str, Any] = {
    "network": "resnet18", "projection": 128, "hidden": 512, "momentum": 0.996, "batch_size": 256, "warm_up_epochs": 10,
    "optimizer": "lars", "lr": 0.2, "weight_decay": 1.5e-6,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "channels": 1, "image_size": 8, "classes": 10, "network": "cnn", "projection": 64, "hidden": 256, "momentum": 0.95,
        "batch_size": 64, "epochs": 25, "warm_up_epochs": 2, "optimizer": "adamw", "lr": 3e-3, "weight_decay": 1e-4,
    },
    "imagenet100": {"channels": 3, "image_size": 224, "classes": 100, "epochs": 200, **_PUBLISHED},
    "cifar10": {"channels": 3, "image_size": 32, "classes": 10, "epochs": 200, **_PUBLISHED},
    "stl10": {"channels": 3, "image_size": 96, "classes": 10, "epochs": 200, **_PUBLISHED},
}  # fmt: skip
"""Digits, and the configuration of TSPipe's benchmark (Lim et al. 2022) on its three data sets; its epochs are not published."""


@dataclass(frozen=True)
class Byol:
    """Learn features of images from two views of each, without labels (Grill et al. 2020).

    What is not given is the preset's, shown by --print_config.

    Args:
        preset: form of the data, sizes and rates: digits, or TSPipe's configuration for imagenet100, cifar10 and stl10
        data: a directory of CIFAR-10's python files, or of 'train' and 'val', each with one folder of images for each class; or
            noise, to measure speed (default for digits: those that ship inside scikit-learn)
        image_size: pixels to which views of photographs are resized, in height and in width
        network: the encoder: a plain CNN (see width and depth), or a ResNet
        width: channels in the first half of the cnn; the second half has twice as many
        depth: convolutions of the cnn after its first one
        projection: outputs of the projector and of the predictor
        hidden: units in the hidden layers of the projector and of the predictor
        dropout: fraction of channels that the student's cnn drops
        momentum: momentum m of the teacher's moving average at the start; it rises to 1 along a cosine
        batch_size: samples of one update
        epochs: passes over the data
        warm_up_epochs: epochs at the start in which the learning rate rises evenly
        optimizer: optimizer of the student
        lr: highest learning rate; after the warm-up it falls along a cosine
        sgd_momentum: momentum of SGD and LARS themselves
        weight_decay: L2 penalty (SGD, LARS) or decoupled weight decay (AdamW)
        workers: processes that read images and make views of them, beside those that train
    """

    name: ClassVar[str] = "byol"
    run_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"microbatches": 2})

    # None stands for the preset's value, which replaces it at once.
    preset: Literal["digits", "imagenet100", "cifar10", "stl10"] = "digits"
    data: str | None = None
    image_size: int = None  # type: ignore[assignment]
    network: Literal["cnn", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = None  # type: ignore[assignment]
    width: int = 16
    depth: int = 3
    projection: int = None  # type: ignore[assignment]
    hidden: int = None  # type: ignore[assignment]
    dropout: float = 0.0
    momentum: float = None  # type: ignore[assignment]
    batch_size: int = None  # type: ignore[assignment]
    epochs: int = None  # type: ignore[assignment]
    warm_up_epochs: int = None  # type: ignore[assignment]
    optimizer: Literal["sgd", "adamw", "lars"] = None  # type: ignore[assignment]
    lr: float = None  # type: ignore[assignment]
    sgd_momentum: float = 0.9
    weight_decay: float = None  # type: ignore[assignment]
    workers: int = 0

    def __post_init__(self) -> None:
        """Raises `ConfigError` with everything that cannot be."""
        filled(self, PRESETS[self.preset])
        least = {
            "image_size": 8, "width": 1, "depth": 2, "projection": 1, "hidden": 1, "batch_size": 2, "epochs": 1,
            "warm_up_epochs": 0, "workers": 0,
        }  # fmt: skip
        problems = problems_of(self, least, ("dropout", "momentum", "sgd_momentum"), ("lr",))
        if self.dropout and self.network != "cnn":
            problems.append(f"dropout is {self.dropout}; a {self.network} has none")
        if problems:
            raise ConfigError("; ".join(problems))

    def workload(self, seed: int, num_samples: int | None = None) -> MomentumWorkload:
        """The task, the data and how it is trained. Raises `DataError` for data that is missing or broken."""
        preset = PRESETS[self.preset]
        form = (preset["channels"], self.image_size, preset["classes"])
        images = images_of(self.data, self.preset, form, self.batch_size, seed)
        loader = view_loader(images, two_views(images), self.batch_size, num_samples=num_samples, workers=self.workers)
        return MomentumWorkload(
            build=lambda: self._task(images, seed, self.epochs * len(loader)),
            evaluate=FeatureQuality(images, encoder_of, workers=self.workers),
            train_loader=loader,
            student_training=training_of(
                self.epochs, self.optimizer, self.lr, self.weight_decay, self.sgd_momentum,
                lr_schedule=warmed_up(cosine, self.warm_up_epochs / self.epochs),
            ),
        )  # fmt: skip

    def _task(self, images: Images, seed: int, total_steps: int) -> Momentum:
        encoder, features = self._encoder(images, derive(seed, "student"))
        projector = seeded(derive(seed, "projector"), lambda: Perceptron((features, self.hidden, self.projection)))
        predictor = seeded(
            derive(seed, "predictor"), lambda: Perceptron((self.projection, self.hidden, self.projection))
        )
        teacher = Chain(encoder=copy.deepcopy(encoder), projector=copy.deepcopy(projector))
        student = Chain(encoder=encoder, projector=projector, predictor=predictor)
        return Momentum(teacher, student, byol, momentum=rising(self.momentum, total_steps), views=2)

    def _encoder(self, images: Images, seed: int) -> tuple[nn.Module, int]:
        """Images -> features (rows, dim), and dim."""
        if self.network == "cnn":
            return seeded(seed, lambda: cnn(images.channels, self.width, self.depth, self.dropout)), self.width * 2
        resnet: Any = network(RESNETS[self.network], images.channels, images.size, 0, seed=seed, cuts="residual")
        return resnet, resnet.num_features


class Pooled(nn.Module):
    """The mean over the image of what another module gives: (rows, in, h, w) -> (rows, out)."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x).mean((2, 3))  # type: ignore[no-any-return]


def cnn(channels: int, width: int, depth: int, dropout: float) -> nn.Sequential:
    """A first convolution and `depth` more, the middle one of which halves the image, and behind it twice the width."""
    blocks: list[nn.Module] = [Convolution(channels, width, 1, dropout)]
    before = width
    for i in range(depth):
        after = width * (2 if i >= depth // 2 else 1)
        blocks.append(Convolution(before, after, 2 if i == depth // 2 else 1, dropout))
        before = after
    return nn.Sequential(*blocks[:-1], Pooled(blocks[-1]))


def two_views(images: Images) -> tuple[View, View]:
    """BYOL's, which differ in blur and solarising where images are photographs."""
    if images.channels == 1:
        return Scans(images.size), Scans(images.size)
    return Photographs(images.size, blurred=1.0), Photographs(images.size, blurred=0.1, solarised=0.2)
