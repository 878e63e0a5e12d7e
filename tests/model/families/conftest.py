"""Libraries of models that tests use where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest) -> Any:
    """The library, where it is installed. PyPI's torchvision lacks two operators beside a torch for CPUs: given here."""
    name = request.param
    if importlib.util.find_spec(name) is None or importlib.util.find_spec("torchvision") is None:
        pytest.skip(f"{name} is not installed")
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for form in ("nms(Tensor dets, Tensor scores, float t) -> Tensor", "qnms(Tensor dets, Tensor scores, float t) -> Tensor"):
        if not hasattr(torch.ops.torchvision, form.partition("(")[0]):
            operators.define(form)
    return importlib.import_module(name)
