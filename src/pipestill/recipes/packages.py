"""Packages that only some recipes need."""

from importlib import import_module
from typing import Any

from pipestill.errors import ConfigError


def needed(module: str, use: str, package: str) -> Any:
    """Import a module; `ConfigError` where its package is missing, which begins with what it is used for."""
    try:
        return import_module(module)
    except ImportError:
        raise ConfigError(f"{use}, which is not installed; run pip install {package}") from None
