"""Blocks of timm's and torchvision's image models, told by their classes' names, and such models by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.errors import ConfigError, nearest
from pipestill.model.block import Block

Cuts = list[str | Block]


def image_model_blocks(model: nn.Module) -> Cuts | None:
    """The blocks of an image classifier of timm or torchvision: (rows, 3, height, width) -> logits (rows, classes).

    ResNets, ViTs, ConvNeXts, MobileNets and EfficientNets are known, one block a residual or transformer block; None for
    anything else, subclasses of these included. Neither library is imported.
    """
    kind = type(model)
    library = kind.__module__.partition(".")[0]
    cut = _FAMILIES.get((library, kind.__name__)) if kind.__module__.startswith(f"{library}.models.") else None
    return None if cut is None else cut(model)


def _resnet(model: Any) -> Cuts:
    """Both libraries' ResNets have the same children but for the ends."""

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
    def embed(x: Tensor) -> Any:
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))

    def classify(x: Tensor) -> Any:
        return model.forward_head(model.norm(x))

    return [Block("patches", embed, (*_there(model, "patch_embed", "norm_pre"), *_own(model))), *_inside(model, "blocks"),
            Block("head", classify, _there(model, "norm", "attn_pool", "fc_norm", "head"))]  # fmt: skip


def _torchvision_vit(model: Any) -> Cuts:
    def embed(x: Tensor) -> Any:
        x = model._process_input(x)
        x = torch.cat([model.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return model.encoder.dropout(x + model.encoder.pos_embedding)

    def classify(x: Tensor) -> Any:
        return model.heads(model.encoder.ln(x)[:, 0])

    return [Block("patches", embed, ("conv_proj", "class_token", "encoder.pos_embedding")),
            *_inside(model, "encoder.layers"), Block("head", classify, ("encoder.ln", "heads"))]  # fmt: skip


def _timm_convnext(model: Any) -> Cuts:
    def classify(x: Tensor) -> Any:
        return model.forward_head(model.norm_pre(x))

    cuts: Cuts = ["stem"]
    for i, inner in enumerate(model.stages):
        if any(True for _ in inner.downsample.parameters()):
            cuts.append(f"stages.{i}.downsample")
        cuts += _inside(model, f"stages.{i}.blocks")
    return [*cuts, Block("head", classify, _there(model, "norm_pre", "head"))]


def _timm_efficientnet(model: Any) -> Cuts:
    """MobileNetV2 and EfficientNets; MobileNetV3's head comes after the pooling, in `forward_head`."""

    def stem(x: Tensor) -> Any:
        return model.bn1(model.conv_stem(x))

    def classify(x: Tensor) -> Any:
        return model.forward_head(model.bn2(model.conv_head(x)) if hasattr(model, "bn2") else x)

    blocks = [name for i in range(len(model.blocks)) for name in _inside(model, f"blocks.{i}")]
    ends = ("conv_head", "bn2", "norm_head", "global_pool", "classifier")
    return [Block("stem", stem, ("conv_stem", "bn1")), *blocks, Block("head", classify, _there(model, *ends))]


def _torchvision_features(model: Any) -> Cuts:
    """ConvNeXts, MobileNets and EfficientNets: `features`, pooling, `classifier`."""

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
    """The names of what a plain sequence consists of, sequences within it taken apart too."""
    for key, child in model.get_submodule(name).named_children():
        if type(child) is nn.Sequential and len(child):
            yield from _inside(model, f"{name}.{key}")
        else:
            yield f"{name}.{key}"


def _there(model: nn.Module, *names: str) -> tuple[str, ...]:
    """Those of the submodules that the model has."""
    return tuple(name for name in names if isinstance(getattr(model, name, None), nn.Module))


def _own(model: nn.Module) -> tuple[str, ...]:
    """Parameters and buffers of the model itself, such as tokens and positions."""
    named = (*model.named_parameters(recurse=False), *model.named_buffers(recurse=False))
    return tuple(name for name, _ in named)


# ---------------------------------------------------------------- models by name

LIBRARIES = ("timm", "torchvision")


def load_model(name: str, num_classes: int | None = None, seed: int = 0) -> nn.Module:
    """The model that `timm:NAME` or `torchvision:NAME` names, initialised from `seed`; nothing is downloaded.

    `num_classes`: outputs of its last layer (default: the library's, mostly ImageNet's 1,000). `ConfigError` where the
    library is missing, does not fit the installed torch, or has no such model.
    """
    library, _, wanted = name.partition(":")
    if library not in LIBRARIES or not wanted:
        raise ConfigError(f"no model '{name}'; expected timm:NAME or torchvision:NAME, such as torchvision:resnet152")
    module = _imported(library)
    models = module if library == "timm" else import_module("torchvision.models")
    known = list(models.list_models())
    if wanted not in known:
        raise ConfigError(f"{library} {_version_of(library)} has no model '{wanted}'{nearest(wanted, known)}")
    options = {} if num_classes is None else {"num_classes": num_classes}
    make = (
        partial(models.create_model, pretrained=False) if library == "timm" else partial(models.get_model, weights=None)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built: nn.Module = make(wanted, **options)
        return built


def _imported(library: str) -> Any:
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] in (library, "torchvision"):
            needs = "" if error.name == library else f" (it needs {error.name})"
            raise ConfigError(
                f"models of {library} need {library}, which is not installed{needs}; run pip install 'pipestill[vision]'"
            ) from None
        raise ConfigError(f"{library} cannot be imported: {error}; run pip install 'pipestill[vision]'") from None
    except Exception as error:  # built for another torch, it fails in ways of its own: operators, symbols, libraries
        what = " ".join(str(error).split())
        raise ConfigError(
            f"the installed torchvision {_version_of('torchvision')} does not fit torch {torch.__version__}"
            f"{', and timm needs it' if library == 'timm' else ''} ({type(error).__name__}: {what}); install both from one "
            f"index, as in pip install torch torchvision --index-url https://download.pytorch.org/whl/{_index()}"
        ) from None


def _index() -> str:
    return "cpu" if torch.version.cuda is None else f"cu{torch.version.cuda.replace('.', '')}"


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(of unknown version)"
