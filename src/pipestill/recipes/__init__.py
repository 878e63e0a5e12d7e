"""Shipped workloads: each a value that a user could have written."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from pipestill.errors import ConfigError, nearest
from pipestill.recipes.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Entry:
    """A shipped recipe, described without importing it. `needs` are the packages beyond the dependencies."""

    name: str
    home: str
    summary: str
    data: str
    needs: tuple[str, ...]

    def load(self) -> type[Recipe]:
        module, _, name = self.home.partition(":")
        recipe: type[Recipe] = getattr(import_module(module), name)
        return recipe


RECIPES = {
    "soft-target": Entry(
        "soft-target",
        "pipestill.recipes.soft_target:SoftTarget",
        "distil a CNN into a much smaller one by its softened logits (Hinton et al.; TSPipe's KD benchmark)",
        "scikit-learn's digits: 1,797 real 8x8 scans of handwriting, embedded",
        ("scikit-learn",),
    ),
    "byol": Entry(
        "byol",
        "pipestill.recipes.byol:Byol",
        "two views and a momentum teacher, no labels (Grill et al.); for schedules: its digits need no learning",
        "scikit-learn's digits: 1,797 real 8x8 scans of handwriting, embedded",
        ("scikit-learn",),
    ),
    "compress": Entry(
        "compress",
        "pipestill.recipes.compress:Compress",
        "replace a VGG's or ResNet's convolutions by depthwise-separable ones, block by block (Pipe-BD)",
        "the same digits; with --data PATH CIFAR-10's files or folders of images (with Pillow)",
        ("scikit-learn",),
    ),
    "nas": Entry(
        "nas",
        "pipestill.recipes.nas:Nas",
        "search a supernet for a network, block by block, with a MobileNetV2 as the teacher (Pipe-BD, ProxylessNAS)",
        "the same digits; with --data PATH CIFAR-10's files or folders of images (with Pillow)",
        ("scikit-learn",),
    ),
}


def find(name: str) -> Entry:
    """The recipe called `name`; `ConfigError` with the nearest name when there is none."""
    if name not in RECIPES:
        raise ConfigError(f"no recipe '{name}'{nearest(name, RECIPES)}; 'pipestill recipes' lists {', '.join(RECIPES)}")
    return RECIPES[name]
