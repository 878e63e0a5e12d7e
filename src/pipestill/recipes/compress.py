"""Block-by-block compression of a CNN: a VGG or ResNet teacher, a student of depthwise-separable convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch

from pipestill import losses
from pipestill.errors import ConfigError
from pipestill.lr_schedules import cosine
from pipestill.model.blockwise.task import Blockwise
from pipestill.model.seeding import derive
from pipestill.recipes.blockwise import BlockwiseWorkload
from pipestill.recipes.datasets import Images, choose_images
from pipestill.recipes.networks import Shape, network
from pipestill.recipes.recipe import filled
from pipestill.recipes.run_options import Numbers
from pipestill.recipes.training import OPTIMIZERS, Training

BLOCK_LOSSES: dict[str, losses.BlockLoss] = {
    "mse": losses.mse, "normalised": losses.normalised_mse, "cosine": losses.cosine_distance,
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Form of a preset's images, and how long to train on them."""

    channels: int
    image_size: int
    num_classes: int
    batch_size: int
    teacher_epochs: int
    epochs: int
    fine_tuning_epochs: int
    augment: bool


DATA = {
    "digits": Data(1, 8, 10, 32, 8, 15, 5, augment=False),
    "cifar10": Data(3, 32, 10, 256, 150, 60, 20, augment=True),
    "imagenet": Data(3, 224, 1000, 256, 90, 30, 10, augment=True),
}
"""Presets: batches of 256 for CIFAR-10 and ImageNet are Pipe-BD's (Jang et al., DATE 2023); epochs are usual ones."""

_VGG16, _RESNET18 = (64, 128, 256, 512, 512), (64, 128, 256, 512)
SHAPES = {  # teacher, student
    ("digits", "vgg"): (Shape("vgg", (16, 24, 32, 48, 64), (1, 2, 2, 2, 2)), (1, 2, 2, 2, 2)),
    ("digits", "resnet"): (Shape("resnet", (16, 24, 32, 48), (1, 1, 1, 1)), (1, 1, 1, 1)),
    ("cifar10", "vgg"): (Shape("vgg", _VGG16, (2, 2, 3, 3, 3)), (2, 2, 3, 3, 3)),
    ("cifar10", "resnet"): (Shape("resnet", _RESNET18, (2, 2, 2, 2)), (2, 2, 2, 2)),
    ("imagenet", "vgg"): (Shape("vgg", _VGG16, (2, 2, 3, 3, 3), (4096, 4096)), (2, 2, 3, 3, 3)),
    ("imagenet", "resnet"): (Shape("resnet", _RESNET18, (2, 2, 2, 2)), (2, 2, 2, 2)),
}
"""Teachers of each preset, and the depths of their students: VGG-16 and ResNet-18 but for the digits."""


@dataclass(frozen=True)
class Compress:
    """Replace a CNN's convolutions by depthwise-separable ones, block by block.

    Each block of the student learns alone to give what the teacher's gives; then, unless fine_tuning_epochs is 0, the whole
    student is distilled end to end. What is not given is the preset's, shown by --print_config.

    Args:
        preset: form of the data, sizes and epochs: digits, or Pipe-BD's configurations of VGG-16 for cifar10 and imagenet
        data: a directory of CIFAR-10's python files, or of 'train' and 'val', each with one folder of images for each class; or
            noise, to measure speed (default for digits: those that ship inside scikit-learn)
        image_size: pixels to which images from folders are resized, in height and in width
        network: family of the teacher and the student
        teacher_norm: put batch norm behind the convolutions of a VGG teacher
        widths: channels of each stage, such as 64,128,256,512,512
        depths: convolutions (vgg) or residual blocks of two convolutions (resnet) in each stage of the teacher
        student_depths: convolutions (vgg) or residual blocks of two convolutions (resnet) in each stage of the student
        hidden: units in the hidden layers of a VGG teacher's classifier, [] for none; the student's classifier has none
        block_loss: loss of each block but the last: mean squared error, mean squared error relative to the teacher's outputs, or
            1 - cosine
        temperature: temperature T that softens the logits of both models in the loss of the last block
        fine_tuning_temperature: temperature T that softens the logits of both models in the fine-tuning, whose loss has softened
            logits and labels
        batch_size: samples of one update
        epochs: passes over the data for the student's blocks
        teacher_epochs: passes over the data for the teacher
        fine_tuning_epochs: passes over the data end to end, after the blocks; 0 for none. The student without a teacher is
            trained for epochs and fine_tuning_epochs together
        optimizer: optimizer of each block; trainings end to end have sgd always
        lr: learning rate of the blocks at the start; each learning rate falls along a cosine
        teacher_lr: learning rate of the teacher, and of the student without a teacher, at the start
        fine_tuning_lr: learning rate of the fine-tuning at the start
        sgd_momentum: momentum of SGD itself
        weight_decay: L2 penalty (SGD) or decoupled weight decay (AdamW)
        augment: train on images that are shifted and mirrored at random, and on random parts of those from folders
        workers: processes that read images, beside those that train
    """

    name: ClassVar[str] = "compress"
    run_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"strategy": "balanced", "microbatches": 2})

    # None stands for the preset's value, which replaces it at once.
    preset: Literal["digits", "cifar10", "imagenet"] = "digits"
    data: str | None = None
    image_size: int = None  # type: ignore[assignment]
    network: Literal["vgg", "resnet"] = "vgg"
    teacher_norm: bool = True
    widths: Numbers = None  # type: ignore[assignment]
    depths: Numbers = None  # type: ignore[assignment]
    student_depths: Numbers = None  # type: ignore[assignment]
    hidden: Numbers = None  # type: ignore[assignment]
    block_loss: Literal["mse", "normalised", "cosine"] = "mse"
    temperature: float = 1.0
    fine_tuning_temperature: float = 4.0
    batch_size: int = None  # type: ignore[assignment]
    epochs: int = None  # type: ignore[assignment]
    teacher_epochs: int = None  # type: ignore[assignment]
    fine_tuning_epochs: int = None  # type: ignore[assignment]
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = 0.02
    teacher_lr: float = 0.05
    fine_tuning_lr: float = 0.02
    sgd_momentum: float = 0.9
    weight_decay: float = 1e-4
    augment: bool = None  # type: ignore[assignment]
    workers: int = 0

    def __post_init__(self) -> None:
        """Raises `ConfigError` with everything that cannot be."""
        teacher, student_depths = SHAPES[self.preset, self.network]
        preset = {**vars(DATA[self.preset]), **vars(teacher), "student_depths": student_depths}
        filled(self, preset)
        if problems := self._problems():
            raise ConfigError("; ".join(problems))

    def _problems(self) -> list[str]:
        least = {
            "image_size": 8, "batch_size": 2, "epochs": 1, "teacher_epochs": 1, "fine_tuning_epochs": 0, "workers": 0,
        }  # fmt: skip
        problems = [
            f"{name} is {getattr(self, name)}; expected at least {count}"
            for name, count in least.items()
            if getattr(self, name) < count
        ]
        problems += [
            f"{name} is {getattr(self, name)}; expected more than 0"
            for name in ("temperature", "fine_tuning_temperature", "lr", "teacher_lr", "fine_tuning_lr")
            if not getattr(self, name) > 0
        ]
        if not 0.0 <= self.sgd_momentum < 1.0:
            problems.append(f"sgd_momentum is {self.sgd_momentum}; expected 0 or more, and less than 1")
        if self.weight_decay < 0:
            problems.append(f"weight_decay is {self.weight_decay}; expected 0 or more")
        for name in ("widths", "depths", "student_depths", "hidden"):
            if any(number < 1 for number in getattr(self, name)):
                problems.append(f"{name} is {_listed(getattr(self, name))}; expected numbers of at least 1")
        stages = len(self.widths)
        if not stages:
            problems.append("widths is empty; expected the channels of at least one stage")
        problems += [
            f"{name} is {_listed(getattr(self, name))}, of {len(getattr(self, name))} stages; widths has {stages}"
            for name in ("depths", "student_depths")
            if len(getattr(self, name)) != stages
        ]
        if self.network == "resnet" and self.hidden:
            problems.append("hidden is of the classifier of a vgg; a resnet's has none")
        if self.network == "resnet" and not self.teacher_norm:
            problems.append("teacher_norm is false; a resnet always has batch norm")
        if self.preset == "digits" and self.data is None and self.image_size != 8:
            problems.append(f"image_size is {self.image_size}; the digits are 8 x 8, so give --data, or leave it out")
        return problems

    def workload(self, seed: int, num_samples: int | None = None) -> BlockwiseWorkload:
        """The task, the data and how it is trained. Raises `DataError` for data that is missing or broken."""
        images = self.images(seed)
        train, test = images.loaders(
            self.batch_size, augment=self.augment, num_samples=num_samples, workers=self.workers
        )
        tuning = Training(self.fine_tuning_epochs, *self._sgd(self.fine_tuning_lr), cosine)
        options = {"weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            options["momentum"] = self.sgd_momentum
        return BlockwiseWorkload(
            build=partial(self.task, images.channels, images.size, images.num_classes, seed),
            train_loader=train,
            validation_loader=test,
            supervised_loss=losses.cross_entropy,
            metrics={"accuracy": losses.accuracy},
            teacher_training=Training(self.teacher_epochs, *self._sgd(self.teacher_lr), cosine),
            student_training=Training(self.epochs, OPTIMIZERS[self.optimizer], self.lr, options, cosine),
            alone_training=Training(self.epochs + self.fine_tuning_epochs, *self._sgd(self.teacher_lr), cosine),
            fine_tuning=tuning if self.fine_tuning_epochs else None,
            fine_tuning_loss=losses.SoftTarget(self.fine_tuning_temperature, weight=1.0),
        )

    def _sgd(self, lr: float) -> tuple[type[torch.optim.Optimizer], float, dict[str, float]]:
        return torch.optim.SGD, lr, {"momentum": self.sgd_momentum, "weight_decay": self.weight_decay}

    def task(self, channels: int, size: int, num_classes: int, seed: int) -> Blockwise:
        """Teacher and student for images (rows, channels, size, size)."""
        teacher = Shape(self.network, self.widths, self.depths, self.hidden)
        student = Shape(self.network, self.widths, self.student_depths)
        form = (channels, size, num_classes)
        return Blockwise(
            network(teacher, *form, norm=self.teacher_norm, seed=derive(seed, "teacher")),
            network(student, *form, separable=True, seed=derive(seed, "student")),
            loss=BLOCK_LOSSES[self.block_loss],
            last_loss=losses.SoftCrossEntropy(self.temperature),
        )

    def images(self, seed: int) -> Images:
        """What is learnt from."""
        preset = DATA[self.preset]
        return choose_images(
            self.data, self.preset, (preset.channels, self.image_size, preset.num_classes), batch_size=self.batch_size,
            augment=self.augment, seed=seed, page="docs/blockwise.md",
        )  # fmt: skip


def _listed(numbers: Numbers) -> str:
    return ",".join(map(str, numbers))
