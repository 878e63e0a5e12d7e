"""Finds the blocks of a model whose family is known, by the module that its class comes from."""

from __future__ import annotations

from torch import nn

from pipestill.model.block import Block
from pipestill.model.families.image_models import image_model_blocks
from pipestill.model.families.language_models import language_model_blocks


def known_blocks(model: nn.Module) -> list[str | Block] | None:
    """The blocks of a model of Hugging Face, timm or torchvision whose family is known; None for any other model.

    A subclass with a `forward` of its own counts as another model. None of the three libraries is imported. Raises
    `ModelError` for a model of a known family whose settings or hooks its blocks would leave out.
    """
    blocks = language_model_blocks(model)
    return image_model_blocks(model) if blocks is None else blocks
