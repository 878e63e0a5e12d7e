"""One block of a model: the atom that partitions into stages are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Block:
    """An indivisible slice of a model: `call` maps the value before it to the value after it.

    `uses` names the submodules and parameters of the model that `call` reads; they move and train with it.
    """

    name: str
    call: Callable[[Any], Any]
    uses: tuple[str, ...]
