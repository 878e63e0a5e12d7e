"""What the recipes with a momentum teacher share: models in a row, perceptrons, the teacher's momentum, their data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.lr_schedules import LrSchedule, cosine
from pipestill.model.block import Block
from pipestill.model.blocks import BlockModel
from pipestill.recipes.datasets import Images, choose_images
from pipestill.recipes.training import OPTIMIZERS, Training

PAGE = "docs/momentum.md"


class Chain(nn.Module):
    """Models one after the other. Each is cut where it says itself, and is one block where it says nothing."""

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
    """The teacher's momentum: from `start` at the first step to 1 after the last, along half a cosine (BYOL, section 3.3)."""
    return cosine(total_steps, start=start, end=1.0)


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` gives with its random numbers from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def encoder_of(network: Any) -> Callable[[Tensor], Tensor]:
    """The part of a chain whose features are of use; what is behind it is there to be trained through."""
    encoder: Callable[[Tensor], Tensor] = network.encoder
    return encoder


def images_of(data: str | None, preset: str, form: tuple[int, int, int], batch_size: int, seed: int) -> Images:
    """What a preset learns from, in the form (channels, size, classes)."""
    return choose_images(data, preset, form, batch_size=batch_size, augment=False, seed=seed, page=PAGE)


def training_of(
    epochs: int, optimizer: str, lr: float, weight_decay: float, sgd_momentum: float, **schedules: Any
) -> Training:
    """How the student is trained. AdamW has no momentum of that name."""
    options = {"weight_decay": weight_decay} | ({} if optimizer == "adamw" else {"momentum": sgd_momentum})
    return Training(epochs, OPTIMIZERS[optimizer], lr, options, **schedules)


def problems_of(recipe: Any, least: dict[str, int], shares: Sequence[str], positive: Sequence[str]) -> list[str]:
    """What is wrong with options: counts of at least so many, numbers from 0 to below 1, and those above 0."""
    problems = [
        f"{name} is {getattr(recipe, name)}; expected at least {count}"
        for name, count in least.items()
        if getattr(recipe, name) < count
    ]
    problems += [
        f"{name} is {getattr(recipe, name)}; expected 0 or more, and less than 1"
        for name in shares
        if not 0.0 <= getattr(recipe, name) < 1.0
    ]
    problems += [
        f"{name} is {getattr(recipe, name)}; expected more than 0" for name in positive if not getattr(recipe, name) > 0
    ]
    if recipe.weight_decay < 0:
        problems.append(f"weight_decay is {recipe.weight_decay}; expected 0 or more")
    if recipe.warm_up_epochs > recipe.epochs:
        problems.append(f"warm_up_epochs is {recipe.warm_up_epochs}, more than the {recipe.epochs} epochs")
    if recipe.preset == "digits" and recipe.data is None and recipe.image_size != 8:
        problems.append(f"image_size is {recipe.image_size}; the digits are 8 x 8, so give --data, or leave it out")
    return problems
