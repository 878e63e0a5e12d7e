"""Search for a network block by block: a MobileNetV2 teacher, a student drawn from a supernet of its operations."""

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn
from torch.utils.data import Subset

from pipestill import losses
from pipestill.errors import ConfigError
from pipestill.lr_schedules import cosine
from pipestill.model.blockwise.task import Blockwise
from pipestill.model.seeding import derive
from pipestill.recipes.architecture_search import (
    Alternating,
    Interleaved,
    SearchSteps,
    WithFlops,
    length,
    rows_apart,
    weights_and_alphas,
)
from pipestill.recipes.blockwise import BlockwiseWorkload
from pipestill.recipes.blockwise_recipe import BLOCK_LOSSES, BlockwiseRecipe, listed
from pipestill.recipes.images import Images
from pipestill.recipes.recipe import filled
from pipestill.recipes.run_options import Numbers
from pipestill.recipes.supernet import (
    MobileShape,
    Network,
    Paths,
    best_paths,
    count_flops,
    derived,
    largest_paths,
    network,
    random_paths,
    same_path,
    search_stages,
    supernet,
)
from pipestill.recipes.training import Training
from pipestill.recipes.weights import num_parameters

_RANDOM_PATHS = 5
_TEACHER = "k3e6"


_PUBLISHED: dict[str, Any] = {
    "channels": 3, "widths": (24, 32, 64, 96, 160, 320), "teacher_cells": (2, 3, 4, 3, 3, 1), "cells": (2, 4, 4, 4, 4, 1),
    "stem": (32, 16), "head": 1280, "kernels": (3, 5, 7), "expansions": (3, 6), "batch_size": 256, "lr": 0.05,
    "alpha_lr": 1e-3, "flops_weight": 0.0, "augment": True,
}  # fmt: skip
PRESETS = {
    "digits": SimpleNamespace(
        channels=1, image_size=8, num_classes=10, widths=(8, 12, 16, 24, 32, 40), teacher_cells=(1, 2, 2, 2, 2, 1),
        cells=(1, 2, 2, 2, 2, 1), strides=(1, 2, 1, 1, 2, 1), stem=(16, 8), stem_stride=1, head=64, kernels=(3, 5, 7),
        expansions=(3, 6), batch_size=64, teacher_epochs=8, epochs=16, fine_tuning_epochs=6, lr=0.2, alpha_lr=0.05,
        flops_weight=0.05, augment=False,
    ),
    "cifar10": SimpleNamespace(
        **_PUBLISHED, image_size=32, num_classes=10, strides=(1, 2, 2, 1, 2, 1), stem_stride=1, teacher_epochs=150, epochs=60,
        fine_tuning_epochs=20,
    ),
    "imagenet": SimpleNamespace(
        **_PUBLISHED, image_size=224, num_classes=1000, strides=(2, 2, 2, 1, 2, 1), stem_stride=2, teacher_epochs=90,
        epochs=30, fine_tuning_epochs=10,
    ),
}  # fmt: skip
"""The presets. In cifar10 and imagenet, the blocks, the batch and the rate of the architecture are those of Pipe-BD (Jang et
al., DATE 2023). The stem, the head and the teacher's cells are those of MobileNetV2 (Sandler et al. 2018, table 2). Epochs and
`lr` are usual ones."""


@dataclass(frozen=True)
class Nas(BlockwiseRecipe):
    """Search for a network: each cell of the student chooses between convolutions of several sizes, block by block.

    Each block of the student is trained alone to give what the teacher's block gives, along one random path a batch; on held-out
    data it is trained how likely its paths should be. The most likely ones make the network, which is then, unless
    fine_tuning_epochs is 0, distilled end to end. What is not given is the preset's, shown by --print_config.

    Args:
        preset: form of the data, sizes and epochs: digits, or Pipe-BD's configurations for cifar10 and imagenet
        weight_decay: L2 penalty of weights
        temperature: temperature T that softens logits in the loss of the last block and in the fine-tuning
        lr: learning rate of the blocks' weights (SGD, Nesterov) at the start; each rate but alpha_lr falls along a cosine
        widths: channels of each block
        teacher_cells: MBConvs (k3e6) in each block of the teacher
        cells: places to fill in each block of the student
        strides: divisors of the image's height and width in the first cell of each block
        stem: channels of the first convolution, and of the MBConv (k3e1) behind it
        stem_stride: divisor of the image's height and width in the first convolution
        head: channels of the last convolution, before the classifier
        kernels: sizes of convolutions to choose from, all odd
        expansions: factors on the channels inside an MBConv to choose from
        flops_weight: weight of a block's expected FLOPs, as a fraction of the most it could have, in the loss of its paths
        held_out: fraction of the training data on which paths are trained, and weights are not
        every: batches for the weights before each batch for the paths
        warm_up: fraction of the epochs before paths are trained
        alpha_lr: constant learning rate of the paths (Adam)
    """

    name: ClassVar[str] = "nas"
    page: ClassVar[str] = "docs/architecture-search.md"

    preset: Literal["digits", "cifar10", "imagenet"] = "digits"
    weight_decay: float = 5e-4
    widths: Numbers = None  # type: ignore[assignment]
    teacher_cells: Numbers = None  # type: ignore[assignment]
    cells: Numbers = None  # type: ignore[assignment]
    strides: Numbers = None  # type: ignore[assignment]
    stem: Numbers = None  # type: ignore[assignment]
    stem_stride: int = None  # type: ignore[assignment]
    head: int = None  # type: ignore[assignment]
    kernels: Numbers = None  # type: ignore[assignment]
    expansions: Numbers = None  # type: ignore[assignment]
    flops_weight: float = None  # type: ignore[assignment]
    held_out: float = 0.2
    every: int = 5
    warm_up: float = 0.25
    alpha_lr: float = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Raise `ConfigError` with everything that cannot be."""
        filled(self, vars(PRESETS[self.preset]))
        least = {"image_size": 4, "stem_stride": 1, "head": 1, "every": 1, "flops_weight": 0}
        self.check(least, fractions=("warm_up",), above_0=("alpha_lr",), more=self._problems())

    def _problems(self) -> list[str]:
        problems = []
        if not 0.0 < self.held_out < 1.0:
            problems.append(f"held_out is {self.held_out}; expected more than 0 and less than 1")
        lists = ("widths", "teacher_cells", "cells", "strides", "stem", "kernels", "expansions")
        problems += [
            f"{name} is {listed(getattr(self, name))}; expected numbers of at least 1"
            for name in lists
            if not getattr(self, name) or min(getattr(self, name)) < 1
        ]
        problems += [
            f"{name} is {listed(getattr(self, name))}, of {len(getattr(self, name))} blocks; widths has {len(self.widths)}"
            for name in ("teacher_cells", "cells", "strides")
            if len(getattr(self, name)) != len(self.widths)
        ]
        if len(self.stem) != 2:
            problems.append(f"stem is {listed(self.stem)}; expected two numbers, such as 32,16")
        if any(kernel % 2 == 0 for kernel in self.kernels):
            problems.append(f"kernels is {listed(self.kernels)}; expected odd numbers")
        for name in ("kernels", "expansions"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                problems.append(f"{name} is {listed(getattr(self, name))}; expected each number once")
        if len(self.kernels) * len(self.expansions) == 1:
            problems.append("kernels and expansions leave one path in each cell; give two numbers of one of them")
        return problems

    def form(self) -> tuple[int, int]:
        return PRESETS[self.preset].channels, PRESETS[self.preset].num_classes

    def workload(self, seed: int, num_samples: int | None = None) -> BlockwiseWorkload:
        """Build task, data and trainings. Raises `DataError` for data that is missing or broken.

        On the first `num_samples`, which are for trying out, paths learn from the first epoch on.
        """
        images = self.images(seed)
        few = num_samples is not None
        count = length(images.train) if num_samples is None else min(max(2, num_samples), length(images.train))
        generator = torch.Generator().manual_seed(derive(seed, "held out"))
        train, test = self._loaders(images, range(count))
        weights, paths = (self._loaders(images, rows)[0] for rows in rows_apart(count, self.held_out, generator))
        if len(weights) < self.every and not few:
            raise ConfigError(
                f"an epoch has {len(weights)} batches for the weights, and paths learn after every {self.every}; "
                "lower --every or --batch_size"
            )
        warm_up = 0 if few else int(self.epochs * self.warm_up)
        steps = SearchSteps(len(weights), min(self.every, len(weights)), warm_up)
        search = {"alpha_lr": self.alpha_lr, "momentum": self.sgd_momentum, "weight_decay": self.weight_decay}
        return BlockwiseWorkload(
            build=partial(self.task, images, steps, seed),
            train_loader=train,
            validation_loader=test,
            student_training=Training(self.epochs, Alternating, self.lr, search, cosine, weights_and_alphas),
            block_loader=Interleaved(weights, paths, steps),
            derive=_derived,
            fresh=lambda found: self.network(cast(Network, found).paths, images, derive(seed, "alone")),
            rivals=lambda task: {"random_paths": [
                derived(_supernet(task), random_paths(_supernet(task), derive(seed, i))) for i in range(_RANDOM_PATHS)
            ]},
            describe=partial(self.describe, images),
            **self.of_whole_models(self.temperature),
        )  # fmt: skip

    def _loaders(self, images: Images, rows: Any) -> tuple[Any, Any]:
        return replace(images, train=Subset(images.train, rows)).loaders(
            self.batch_size, augment=self.augment, workers=self.workers
        )

    def _shape(self, cells: Numbers) -> MobileShape:
        first, second = self.stem
        return MobileShape(self.widths, cells, self.strides, (first, second), self.head, self.stem_stride)

    def task(self, images: Images, steps: SearchSteps, seed: int) -> Blockwise:
        """Build teacher and supernet for images of that form."""
        shape = self._shape(self.teacher_cells)
        teacher = network(shape, same_path(shape, _TEACHER), images.channels, images.num_classes, derive(seed, "teacher"))
        student = supernet(
            self._shape(self.cells), self.kernels, self.expansions, images.channels, images.size, images.num_classes,
            steps=steps, seed=seed,
        )  # fmt: skip
        each = [BLOCK_LOSSES[self.block_loss]] * (len(student) - 1) + [losses.SoftCrossEntropy(self.temperature)]
        stages = search_stages(student)
        return Blockwise(teacher, student, [WithFlops(loss, s, self.flops_weight) for loss, s in zip(each, stages, strict=True)])

    def network(self, paths: Paths, images: Images, seed: int) -> Network:
        """Build the network of some paths, as it is initialised."""
        return network(self._shape(self.cells), paths, images.channels, images.num_classes, seed)

    def describe(self, images: Images, task: Blockwise, found: nn.Module) -> dict[str, Any]:
        """Describe what was found, and how large it is beside the teacher and the largest path."""
        largest = self.network(largest_paths(_supernet(task)), images, 0)
        models = {"teacher": task.teacher, "student": found, "largest_path": largest}
        return {"search": {
            "paths": [list(stage) for stage in cast(Network, found).paths],
            "flops": {name: count_flops(model, images.channels, images.size) for name, model in models.items()},
            "parameters": {name: num_parameters(model) for name, model in models.items()},
        }}  # fmt: skip


def _supernet(task: Blockwise) -> nn.Sequential:
    return cast(nn.Sequential, task.student)


def _derived(task: Blockwise) -> nn.Module:
    return derived(_supernet(task), best_paths(_supernet(task)))
