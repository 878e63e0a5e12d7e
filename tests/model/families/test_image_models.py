"""Models of timm and torchvision: their blocks chained are their forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipestill.model.blocks import BlockModel
from pipestill.model.families.image_models import image_model_blocks
from pipestill.model.families.load import load_model

SMALL: dict[str, dict[str, Any]] = {
    "timm:resnet18": {},
    "timm:resnet26": {},
    "timm:vit_tiny_patch16_224": {"depth": 2, "img_size": 32},
    "timm:convnext_atto": {},
    "timm:mobilenetv2_035": {},
    "timm:mobilenetv3_small_050": {},
    "torchvision:resnet18": {},
    "torchvision:resnet50": {},
    "torchvision:vit_b_16": {},
    "torchvision:convnext_tiny": {},
    "torchvision:mobilenet_v2": {},
    "torchvision:mobilenet_v3_small": {},
    "torchvision:efficientnet_b0": {},
}


@pytest.mark.parametrize(("library", "name"), [(name.partition(":")[0], name) for name in SMALL], indirect=["library"])
def test_blocks_do_what_the_whole_does(library: Any, name: str) -> None:
    model = _built(library, name).eval()
    cuts = image_model_blocks(model)
    assert cuts is not None
    blocks = BlockModel(model, cuts)
    assert len(blocks) >= 4
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(blocks(images), model(images))


def _built(library: Any, name: str) -> nn.Module:
    options = SMALL[name]
    if options:
        built: nn.Module = library.create_model(name.partition(":")[2], **options)
        return built
    if "vit_b" in name:
        vit: nn.Module = library.models.VisionTransformer(32, 16, 2, 2, 16, 32)
        return vit
    return load_model(name, num_classes=5)


def test_other_models_are_not_known() -> None:
    class ResNet(nn.Module):
        """Of that name, but somebody else's."""

    assert image_model_blocks(ResNet()) is None
    assert image_model_blocks(nn.Linear(2, 2)) is None
