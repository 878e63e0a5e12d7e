"""Models of timm and torchvision by name; without the libraries, clear messages."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from pipestill.errors import ConfigError
from pipestill.model.families import load
from pipestill.model.families.load import load_model


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

    monkeypatch.setattr(load, "import_module", missing)
    with pytest.raises(ConfigError, match=r"timm, which is not installed; run pip install timm"):
        load_model("timm:resnet18")


def test_a_torchvision_of_another_torch_is_told_with_what_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(load, "import_module", broken)
    with pytest.raises(ConfigError, match=r"does not fit torch .*nms does not exist.*pip install torch torchvision"):
        load_model("torchvision:resnet18")
