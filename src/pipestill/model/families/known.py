"""The blocks of models of known families, told by the module that their class comes from; no library is imported for it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from pipestill.model.blocks import Block

_FAMILIES = {
    "transformers": "pipestill.model.families.text:text_blocks",
    "timm": "pipestill.model.families.vision:vision_blocks",
    "torchvision": "pipestill.model.families.vision:vision_blocks",
}
"""The library that a class is of, and who knows its families."""


def known_blocks(model: nn.Module) -> list[str | Block] | None:
    """The blocks of a model of a known family (of Hugging Face, timm or torchvision); None for any other.

    A subclass with a `forward` of its own is another model. Raises `ModelError` for a model of a known family that is set up
    in a way which cannot be cut.
    """
    home = forward_class(model).__module__.partition(".")[0]
    if home not in _FAMILIES:
        return None
    module, _, name = _FAMILIES[home].partition(":")
    blocks: Callable[[nn.Module], Any] = getattr(import_module(module), name)
    return blocks(model)  # type: ignore[no-any-return]


def forward_class(model: nn.Module) -> type:
    """The class that a model's `forward` is written in: its own, or one that it is derived from."""
    return next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
