"""Where image classifiers of timm and torchvision are cut: ResNets, ViTs, ConvNeXts, MobileNets and EfficientNets.

A model is known by the name of its class. Neither library is imported.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.model.block import Block

Cuts = list[str | Block]
"""The blocks of a model in order: names of submodules, or `Block`s."""


def image_model_blocks(model: nn.Module) -> Cuts | None:
    """The blocks of an image classifier of timm or torchvision; None for any other model, subclasses of these included.

    Such a model maps images (rows, 3, height, width) to logits (rows, classes). Each residual or transformer block is one
    block.
    """
    kind = type(model)
    library = kind.__module__.partition(".")[0]
    cut = _FAMILIES.get((library, kind.__name__)) if kind.__module__.startswith(f"{library}.models.") else None
    return None if cut is None else cut(model)


def _resnet(model: Any) -> Cuts:
    """Cut a ResNet; those of the two libraries differ in the names at both ends only."""

    def stem(x: Tensor) -> Any:
        return model.maxpool((model.act1 if hasattr(model, "act1") else model.relu)(model.bn1(model.conv1(x))))

    def classify(x: Tensor) -> Any:
        if hasattr(model, "forward_head"):
            return model.forward_head(x)
        return model.fc(torch.flatten(model.avgpool(x), 1))

    layers = [name for i in range(1, 5) for name in _inside(model, f"layer{i}")]
    return [Block("stem", stem, _there(model, "conv1", "bn1", "act1", "maxpool")), *layers,
            Block("classifier", classify, _there(model, "global_pool", "fc"))]  # fmt: skip


def _timm_vit(model: Any) -> Cuts:
    """Cut timm's vision transformer: patches, one block a layer, head."""

    def embed(x: Tensor) -> Any:
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))

    def classify(x: Tensor) -> Any:
        return model.forward_head(model.norm(x))

    return [Block("patches", embed, (*_there(model, "patch_embed", "norm_pre"), *_own(model))), *_inside(model, "blocks"),
            Block("head", classify, _there(model, "norm", "attn_pool", "fc_norm", "head"))]  # fmt: skip


def _torchvision_vit(model: Any) -> Cuts:
    """Cut torchvision's vision transformer: patches, one block a layer, head."""

    def embed(x: Tensor) -> Any:
        x = model._process_input(x)
        x = torch.cat([model.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return model.encoder.dropout(x + model.encoder.pos_embedding)

    def classify(x: Tensor) -> Any:
        return model.heads(model.encoder.ln(x)[:, 0])

    return [Block("patches", embed, ("conv_proj", "class_token", "encoder.pos_embedding")),
            *_inside(model, "encoder.layers"), Block("head", classify, ("encoder.ln", "heads"))]  # fmt: skip


def _timm_convnext(model: Any) -> Cuts:
    """Cut timm's ConvNeXt: stem, every block and every downsampling that has weights, head."""

    def classify(x: Tensor) -> Any:
        return model.forward_head(model.norm_pre(x))

    cuts: Cuts = ["stem"]
    for i, inner in enumerate(model.stages):
        if any(True for _ in inner.downsample.parameters()):
            cuts.append(f"stages.{i}.downsample")
        cuts += _inside(model, f"stages.{i}.blocks")
    return [*cuts, Block("head", classify, _there(model, "norm_pre", "head"))]


def _timm_efficientnet(model: Any) -> Cuts:
    """Cut timm's MobileNets and EfficientNets. MobileNetV3's last convolution comes after the pooling, in `forward_head`."""

    def stem(x: Tensor) -> Any:
        return model.bn1(model.conv_stem(x))

    def classify(x: Tensor) -> Any:
        return model.forward_head(model.bn2(model.conv_head(x)) if hasattr(model, "bn2") else x)

    blocks = [name for i in range(len(model.blocks)) for name in _inside(model, f"blocks.{i}")]
    ends = ("conv_head", "bn2", "norm_head", "global_pool", "classifier")
    return [Block("stem", stem, ("conv_stem", "bn1")), *blocks, Block("head", classify, _there(model, *ends))]


def _torchvision_features(model: Any) -> Cuts:
    """Cut torchvision's ConvNeXts, MobileNets and EfficientNets: `features`, then pooling and `classifier`."""

    def classify(x: Tensor) -> Any:
        x = model.avgpool(x) if hasattr(model, "avgpool") else nn.functional.adaptive_avg_pool2d(x, (1, 1))
        return model.classifier(x if type(model).__name__ == "ConvNeXt" else torch.flatten(x, 1))

    return [*_inside(model, "features"), Block("classifier", classify, ("classifier",))]


_FAMILIES: dict[tuple[str, str], Callable[[Any], Cuts]] = {
    ("timm", "ResNet"): _resnet,
    ("timm", "VisionTransformer"): _timm_vit,
    ("timm", "ConvNeXt"): _timm_convnext,
    ("timm", "EfficientNet"): _timm_efficientnet,
    ("timm", "MobileNetV3"): _timm_efficientnet,
    ("torchvision", "ResNet"): _resnet,
    ("torchvision", "VisionTransformer"): _torchvision_vit,
    ("torchvision", "ConvNeXt"): _torchvision_features,
    ("torchvision", "MobileNetV2"): _torchvision_features,
    ("torchvision", "MobileNetV3"): _torchvision_features,
    ("torchvision", "EfficientNet"): _torchvision_features,
}


def _inside(model: nn.Module, name: str) -> Iterator[str]:
    """The names of a sequential's children, in order; sequentials inside it are taken apart too."""
    for key, child in model.get_submodule(name).named_children():
        if type(child) is nn.Sequential and len(child):
            yield from _inside(model, f"{name}.{key}")
        else:
            yield f"{name}.{key}"


def _there(model: nn.Module, *names: str) -> tuple[str, ...]:
    """Those of `names` that are submodules of the model."""
    return tuple(name for name in names if isinstance(getattr(model, name, None), nn.Module))


def _own(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's own parameters and buffers, such as class tokens and positions."""
    named = (*model.named_parameters(recurse=False), *model.named_buffers(recurse=False))
    return tuple(name for name, _ in named)
