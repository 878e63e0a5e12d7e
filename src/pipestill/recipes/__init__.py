"""Shipped workloads: each a value that a user could have written."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from pipestill.errors import ConfigError, nearest

if TYPE_CHECKING:
    from pipestill.recipes.recipe import Recipe  # which loads torch


@dataclass(frozen=True, slots=True)
class Entry:
    """A shipped recipe, described without importing it. `needs` are the packages that it takes (default: the digits')."""

    name: str
    home: str
    summary: str
    data: str
    needs: tuple[str, ...] = ("scikit-learn",)

    def load(self) -> type[Recipe]:
        """Import the recipe's class."""
        module, _, name = self.home.partition(":")
        recipe: type[Recipe] = getattr(import_module(module), name)
        return recipe


RECIPES = {
    "soft-target": Entry(
        "soft-target",
        "pipestill.recipes.soft_target:SoftTarget",
        "distil an image classifier into another by its softened logits (Hinton et al.; TSPipe's KD benchmark)",
        "scikit-learn's digits: 1,797 real 8x8 scans of handwriting, embedded; with --data PATH folders of images",
    ),
    "distilbert": Entry(
        "distilbert",
        "pipestill.recipes.distilbert:DistilBert",
        "distil a BERT into a DistilBERT by logits, masked tokens and hidden states (Sanh et al.; TSPipe's benchmark)",
        "the Python language reference, 465,000 characters that ship with CPython; with --data PATH text or a dataset",
        ("transformers", "tokenizers"),
    ),
    "causal-lm": Entry(
        "causal-lm",
        "pipestill.recipes.causal_lm:CausalLm",
        "distil a causal language model (Llama and any other of transformers) into a smaller one, token by token",
        "the same text; with --data PATH JSON lines of text, prompts or chats, text, or a dataset",
        ("transformers", "tokenizers"),
    ),
    "byol": Entry(
        "byol",
        "pipestill.recipes.byol:Byol",
        "features without labels: two views, a predictor and a momentum teacher, CNN or ResNet (Grill et al.)",
        "scikit-learn's digits; with --data PATH CIFAR-10's files or folders of images (with Pillow)",
    ),
    "moco-v3": Entry(
        "moco-v3",
        "pipestill.recipes.moco_v3:MocoV3",
        "features without labels: each image's other view among all others of the batch, ViT (Chen et al.)",
        "the same digits; with --data PATH CIFAR-10's files or folders of images (with Pillow)",
    ),
    "dino": Entry(
        "dino",
        "pipestill.recipes.dino:Dino",
        "features without labels: small views agree with a teacher's of two large ones, CNN or ViT (Caron et al.)",
        "the same digits; with --data PATH CIFAR-10's files or folders of images (with Pillow)",
    ),
    "compress": Entry(
        "compress",
        "pipestill.recipes.compress:Compress",
        "replace a VGG's or ResNet's convolutions by depthwise-separable ones, block by block (Pipe-BD)",
        "the same digits; with --data PATH CIFAR-10's files or folders of images (with Pillow)",
    ),
    "llm-blocks": Entry(
        "llm-blocks",
        "pipestill.recipes.llm_blocks:LlmBlocks",
        "replace a Llama's attentions and MLPs block by block, and choose the best under a budget (Puzzle, MOHAWK)",
        "the Python language reference; with --data PATH JSON lines, text, or a dataset",
        ("transformers", "tokenizers"),
    ),
    "nas": Entry(
        "nas",
        "pipestill.recipes.nas:Nas",
        "search a supernet for a network, block by block, with a MobileNetV2 as the teacher (Pipe-BD, ProxylessNAS)",
        "the same digits; with --data PATH CIFAR-10's files or folders of images (with Pillow)",
    ),
}


def find(name: str) -> Entry:
    """The recipe called `name`; `ConfigError` with the nearest name when there is none."""
    if name not in RECIPES:
        raise ConfigError(f"no recipe '{name}'{nearest(name, RECIPES)}; 'pipestill recipes' lists {', '.join(RECIPES)}")
    return RECIPES[name]
