"""Models of timm and torchvision: their blocks chained are their forward; without the libraries, clear messages."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import nn

from pipestill.errors import ConfigError
from pipestill.model.blocks import BlockModel
from pipestill.model.families import image_models
from pipestill.model.families.image_models import image_model_blocks, load_model


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest) -> Any:
    """The library, where it is installed. PyPI's torchvision lacks two operators beside a torch for CPUs: given here."""
    name = request.param
    if importlib.util.find_spec(name) is None or importlib.util.find_spec("torchvision") is None:
        pytest.skip(f"{name} is not installed")
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for form in (
        "nms(Tensor dets, Tensor scores, float t) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float t) -> Tensor",
    ):
        if not hasattr(torch.ops.torchvision, form.partition("(")[0]):
            operators.define(form)
    return importlib.import_module(name)


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


@pytest.mark.parametrize("library", ["torchvision"], indirect=True)
def test_a_model_by_name_is_seeded_and_of_as_many_classes(library: Any) -> None:
    one, same = (load_model("torchvision:resnet18", num_classes=7, seed=3) for _ in range(2))
    assert torch.equal(one.state_dict()["fc.weight"], same.state_dict()["fc.weight"])
    assert one(torch.rand(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("library", ["torchvision"], indirect=True)
def test_an_unknown_name_is_refused_with_the_nearest(library: Any) -> None:
    with pytest.raises(ConfigError, match="resnet152"):
        load_model("torchvision:resnet_152")


@pytest.mark.parametrize("name", ["resnet18", "keras:resnet18", "timm:"])
def test_a_name_without_its_library_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected timm:NAME or torchvision:NAME"):
        load_model(name)


def test_a_missing_library_is_told_with_what_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(image_models, "import_module", missing)
    with pytest.raises(ConfigError, match=r"timm, which is not installed; run pip install 'pipestill\[vision\]'"):
        load_model("timm:resnet18")


def test_a_torchvision_of_another_torch_is_told_with_what_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(image_models, "import_module", broken)
    with pytest.raises(ConfigError, match=r"does not fit torch .*nms does not exist.*pip install torch torchvision"):
        load_model("torchvision:resnet18")


def test_other_models_are_not_known() -> None:
    class ResNet(nn.Module):
        """Of that name, but somebody else's."""

    assert image_model_blocks(ResNet()) is None
    assert image_model_blocks(nn.Linear(2, 2)) is None
