"""Builds image models of timm and torchvision by name."""

from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from pipestill.errors import ConfigError, nearest
from pipestill.model.seeding import seeded

LIBRARIES = ("timm", "torchvision")


def load_model(name: str, num_classes: int | None = None, seed: int = 0) -> nn.Module:
    """Build the model that `timm:NAME` or `torchvision:NAME` names, with weights drawn from `seed`; nothing is downloaded.

    `num_classes` is the number of outputs of its last layer (default: the library's, mostly ImageNet's 1,000). Raises
    `ConfigError` where the library is missing, does not fit the installed torch, or has no such model.
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
    make = partial(models.create_model, pretrained=False) if library == "timm" else partial(models.get_model, weights=None)
    return seeded(seed, partial(make, wanted, **options))  # type: ignore[no-any-return]


def _imported(library: str) -> Any:
    """Import a library; `ConfigError` with the command that mends it where that fails."""
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] in (library, "torchvision"):
            needs = "" if error.name == library else f" (it needs {error.name})"
            raise ConfigError(
                f"models of {library} need {library}, which is not installed{needs}; run pip install {library}"
            ) from None
        raise ConfigError(f"{library} cannot be imported: {error}; run pip install {library}") from None
    except Exception as error:  # built for another torch, it fails in ways of its own: operators, symbols, libraries
        what = " ".join(str(error).split())
        raise ConfigError(
            f"the installed torchvision {_version_of('torchvision')} does not fit torch {torch.__version__}"
            f"{', and timm needs it' if library == 'timm' else ''} ({type(error).__name__}: {what}); install both from one "
            f"index, as in pip install torch torchvision --index-url https://download.pytorch.org/whl/{_index()}"
        ) from None


def _index() -> str:
    """The name of the installed torch's kind on PyTorch's package index, such as `cpu` or `cu126`."""
    return "cpu" if torch.version.cuda is None else f"cu{torch.version.cuda.replace('.', '')}"


def _version_of(package: str) -> str:
    """The installed version of a package, for messages."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(of unknown version)"
