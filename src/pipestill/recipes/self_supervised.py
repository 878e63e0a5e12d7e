"""What recipes with a momentum teacher share: models in a row, perceptrons, the teacher's momentum, options and workload."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from pipestill.lr_schedules import LrSchedule, cosine
from pipestill.model.block import Block
from pipestill.model.blocks import BlockModel
from pipestill.model.seeding import derive, seeded
from pipestill.model.tasks import Momentum
from pipestill.recipes.augment import Photographs, Scans, View, view_loader
from pipestill.recipes.evaluate_features import FeatureQuality
from pipestill.recipes.image_recipe import ImageRecipe
from pipestill.recipes.images import Images
from pipestill.recipes.momentum import MomentumWorkload
from pipestill.recipes.training import OPTIMIZERS, Training, warmed_up


class Chain(nn.Module):
    """Models one after the other, each with the blocks that it declares, or one block where it declares none."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def pipeline_blocks(self) -> list[str | Block]:
        blocks = list[str | Block]()
        for name, part in self.named_children():
            if type(part) is nn.Sequential or hasattr(part, "pipeline_blocks"):
                for inner in BlockModel(part).blocks:
                    uses = tuple(f"{name}.{use}" for use in inner.uses)
                    blocks.append(Block(f"{name}.{inner.name}", inner.call, uses))
            else:
                blocks.append(name)
        return blocks

    def forward(self, x: Any) -> Any:
        for part in self.children():
            x = part(x)
        return x


class Perceptron(nn.Module):
    """Linear layers with batch norm and ReLU between them, without which such training collapses: (rows, in) -> (rows, out).

    `last_norm`: a batch norm without weights at the end, too (Chen et al. 2021, MoCo v3).
    """

    def __init__(self, sizes: Sequence[int], last_norm: bool = False) -> None:
        super().__init__()
        layers = list[nn.Module]()
        for before, after in pairwise(sizes[:-1]):
            layers += [nn.Linear(before, after, bias=not last_norm), nn.BatchNorm1d(after), nn.ReLU()]
        layers.append(nn.Linear(sizes[-2], sizes[-1], bias=not last_norm))
        if last_norm:
            layers.append(nn.BatchNorm1d(sizes[-1], affine=False))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def rising(start: float, total_steps: int) -> LrSchedule:
    """Make the teacher's momentum: from `start` at the first step to 1 after the last, on half a cosine (BYOL, section 3.3)."""
    return cosine(total_steps, start=start, end=1.0)


def patch_problems(recipe: Any, names: Sequence[str], patch: int) -> list[str]:
    """Find the sizes that are no multiples of a Vision Transformer's patches, as problems."""
    return [
        f"{name} is {getattr(recipe, name)}, no multiple of the patches of {patch} pixels of {recipe.model}"
        for name in names
        if getattr(recipe, name) % patch
    ]


def encoder_of(network: Any) -> Callable[[Tensor], Tensor]:
    """Give the part of a chain whose features are used; what is behind it is there for the training only."""
    encoder: Callable[[Tensor], Tensor] = network.encoder
    return encoder


@dataclass(frozen=True)
class SelfSupervised(ImageRecipe):
    """Options of every recipe with a momentum teacher, and the workload that follows from them.

    Args:
        image_size: pixels to which views of photographs are resized, in height and in width
        epochs: passes over the data
        warm_up_epochs: epochs at the start in which the learning rate rises evenly
        lr: highest learning rate; after the warm-up it falls along a cosine
        momentum: momentum m of the teacher's moving average at the start; it rises to 1 along a cosine
        dropout: fraction of values that the student's layers drop
        workers: processes that read images and make views of them, beside those that train
    """

    run_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"microbatches": 2})
    page: ClassVar[str] = "docs/momentum.md"

    warm_up_epochs: int = None  # type: ignore[assignment]
    lr: float = None  # type: ignore[assignment]
    momentum: float = None  # type: ignore[assignment]
    dropout: float = 0.0

    def check(self, least: Mapping[str, float], **others: Any) -> None:
        """Raise `ConfigError` with everything that is wrong with the options; see `ImageRecipe.check`."""
        too_many = self.warm_up_epochs > self.epochs
        more = [f"warm_up_epochs is {self.warm_up_epochs}, more than the {self.epochs} epochs"] if too_many else []
        others["fractions"] = ("dropout", "momentum", *others.get("fractions", ()))
        others["above_0"] = ("lr", *others.get("above_0", ()))
        super().check({"warm_up_epochs": 0, **least}, **{**others, "more": [*others.get("more", ()), *more]})

    def workload(self, seed: int, num_samples: int | None = None) -> MomentumWorkload:
        """Build task, data and training. Raises `DataError` for data that is missing or broken."""
        images = self.read_images(seed)
        loader = view_loader(images, self.views(images), self.batch_size, num_samples=num_samples, workers=self.workers)
        return MomentumWorkload(
            build=lambda: self.task(images, seed, len(loader)),
            evaluate=FeatureQuality(images, encoder_of, workers=self.workers),
            train_loader=loader,
            student_training=self.training(warmed_up(cosine, self.warm_up_epochs / self.epochs)),
        )

    @abstractmethod
    def views(self, images: Images) -> Sequence[View]:
        """Make the views of each image."""

    @abstractmethod
    def task(self, images: Images, seed: int, steps_per_epoch: int) -> Momentum:
        """Build a fresh task."""

    @abstractmethod
    def training(self, schedule: Callable[[int], LrSchedule]) -> Training:
        """Say how the student is trained, with a schedule of the learning rate."""


@dataclass(frozen=True)
class TwoViews(SelfSupervised):
    """Options of recipes that compare two views of each image by a projector and a predictor.

    Args:
        projection: outputs of the projector and of the predictor
        hidden: units in the hidden layers of the projector and of the predictor
        optimizer: optimizer of the student
        sgd_momentum: momentum of SGD and LARS themselves
    """

    projection: int = None  # type: ignore[assignment]
    hidden: int = None  # type: ignore[assignment]
    optimizer: Literal["sgd", "adamw", "lars"] = None  # type: ignore[assignment]
    sgd_momentum: float = 0.9

    def views(self, images: Images) -> Sequence[View]:
        """Make BYOL's two views, which differ in blur and solarising where images are photographs."""
        if images.channels == 1:
            return Scans(images.size), Scans(images.size)
        return Photographs(images.size, blurred=1.0), Photographs(images.size, blurred=0.1, solarised=0.2)

    def training(self, schedule: Callable[[int], LrSchedule]) -> Training:
        """Say how the student is trained. AdamW has no momentum of that name."""
        options = {"weight_decay": self.weight_decay}
        options |= {} if self.optimizer == "adamw" else {"momentum": self.sgd_momentum}
        return Training(self.epochs, OPTIMIZERS[self.optimizer], self.lr, options, schedule)

    def pair(self, encoder: nn.Module, seed: int, sizes: Sequence[int], last_norm: bool = False) -> tuple[Chain, Chain]:
        """Build teacher and student: an encoder, a projector of these sizes, and the student's predictor."""
        projector = seeded(derive(seed, "projector"), lambda: Perceptron(sizes, last_norm))
        of_predictor = (self.projection, self.hidden, self.projection)
        predictor = seeded(derive(seed, "predictor"), lambda: Perceptron(of_predictor, last_norm))
        teacher = Chain(encoder=copy.deepcopy(encoder), projector=copy.deepcopy(projector))
        return teacher, Chain(encoder=encoder, projector=projector, predictor=predictor)
