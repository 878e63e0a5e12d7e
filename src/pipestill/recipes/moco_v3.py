"""MoCo v3: Vision Transformers that tell each image's two views from all others, with a momentum teacher and no labels."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pipestill.errors import ConfigError
from pipestill.losses import InfoNCE
from pipestill.lr_schedules import cosine
from pipestill.model.seeding import derive
from pipestill.model.tasks import Momentum
from pipestill.recipes.augment import view_loader
from pipestill.recipes.byol import two_views
from pipestill.recipes.datasets import Images
from pipestill.recipes.evaluate_features import FeatureQuality
from pipestill.recipes.momentum import MomentumWorkload
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
from pipestill.recipes.training import warmed_up
from pipestill.recipes.vit import VIT_B, VIT_L, VIT_S_MOCO, ViTShape, vit

MODELS = {"vit-t": ViTShape(48, 3, 3, 2, 2.0), "vit-s": VIT_S_MOCO, "vit-b": VIT_B, "vit-l": VIT_L}
"""A tiny one with patches of 2 x 2 pixels for small images, and those of the paper with patches of 16 x 16."""

PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "channels": 1, "image_size": 8, "classes": 10, "model": "vit-t", "projection": 32, "hidden": 128, "momentum": 0.97,
        "batch_size": 64, "epochs": 30, "warm_up_epochs": 3, "optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.1,
    },
    "imagenet": {
        "channels": 3, "image_size": 224, "classes": 1000, "model": "vit-s", "projection": 256, "hidden": 4096,
        "momentum": 0.99, "batch_size": 128, "epochs": 300, "warm_up_epochs": 40, "optimizer": "lars", "weight_decay": 0.1,
    },
}  # fmt: skip
"""Digits, and the configuration of TSPipe's benchmark (Lim et al. 2022); its epochs are those of MoCo v3."""

_LR_OF_256 = 1.5e-4  # of published configurations, for 256 samples of an update


@dataclass(frozen=True)
class MocoV3:
    """Learn features of images without labels, from two views of each and all other images of the batch.

    The method is that of Chen et al. 2021. The projection of patches stays as it is initialised, and positions are fixed
    sines. What is not given is the preset's, shown by --print_config.

    Args:
        preset: form of the data, sizes and rates: digits, or TSPipe's configuration for imagenet
        data: a directory of CIFAR-10's python files, or of 'train' and 'val', each with one folder of images for each class; or
            noise, to measure speed (default for digits: those that ship inside scikit-learn)
        image_size: pixels to which views of photographs are resized, in height and in width
        model: the encoder, a Vision Transformer: vit-t with patches of 2 x 2 pixels, the others with patches of 16 x 16
        depth: layers of the encoder (default: as many as the model has)
        projection: outputs of the projector and of the predictor
        hidden: units in the hidden layers of the projector and of the predictor
        temperature: temperature that divides the cosines between views
        dropout: fraction of values that the student's layers drop
        momentum: momentum m of the teacher's moving average at the start; it rises to 1 along a cosine
        batch_size: samples of one update
        epochs: passes over the data
        warm_up_epochs: epochs at the start in which the learning rate rises evenly
        optimizer: optimizer of the student
        lr: highest learning rate; after the warm-up it falls along a cosine (default for imagenet: 1.5e-4 for each 256 samples of
            a batch)
        sgd_momentum: momentum of SGD and LARS themselves
        weight_decay: L2 penalty (SGD, LARS) or decoupled weight decay (AdamW)
        workers: processes that read images and make views of them, beside those that train
    """

    name: ClassVar[str] = "moco-v3"
    run_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"microbatches": 2})

    # None stands for the preset's value, which replaces it at once.
    preset: Literal["digits", "imagenet"] = "digits"
    data: str | None = None
    image_size: int = None  # type: ignore[assignment]
    model: Literal["vit-t", "vit-s", "vit-b", "vit-l"] = None  # type: ignore[assignment]
    depth: int = None  # type: ignore[assignment]
    projection: int = None  # type: ignore[assignment]
    hidden: int = None  # type: ignore[assignment]
    temperature: float = 0.2
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
        filled(self, {"depth": MODELS[self.model].depth, "lr": _LR_OF_256 * self.batch_size / 256})
        least = {
            "image_size": 8, "depth": 1, "projection": 1, "hidden": 1, "batch_size": 2, "epochs": 1, "warm_up_epochs": 0,
            "workers": 0,
        }  # fmt: skip
        problems = problems_of(self, least, ("dropout", "momentum", "sgd_momentum"), ("lr", "temperature"))
        patch = MODELS[self.model].patch
        if self.image_size % patch:
            problems.append(
                f"image_size is {self.image_size}, no multiple of the patches of {patch} pixels of {self.model}"
            )
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
        shape = dataclasses.replace(MODELS[self.model], depth=self.depth)
        encoder = vit(
            shape, images.channels, images.size, None, positions="sincos", freeze_patches=True, dropout=self.dropout,
            seed=derive(seed, "student"),
        )  # fmt: skip
        sizes = (shape.width, self.hidden, self.hidden, self.projection)
        projector = seeded(derive(seed, "projector"), lambda: Perceptron(sizes, last_norm=True))
        predictor = seeded(
            derive(seed, "predictor"),
            lambda: Perceptron((self.projection, self.hidden, self.projection), last_norm=True),
        )
        teacher = Chain(encoder=copy.deepcopy(encoder), projector=copy.deepcopy(projector))
        student = Chain(encoder=encoder, projector=projector, predictor=predictor)
        return Momentum(
            teacher,
            student,
            InfoNCE(self.temperature),
            momentum=rising(self.momentum, total_steps),
            views=2,
            batch_loss=True,
        )
