"""How one family of Hugging Face's language models is described: where its models keep their parts, and how these are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class HalfLayer:
    """One half of a transformer layer: its attention or its feed-forward network."""

    name: str
    """The end of the block's name: `attention` or `feed_forward`."""
    uses: tuple[str, ...]
    """The submodules of the layer that this half reads."""
    call: Callable[[Any, Tensor, Tensor | None], Tensor]
    """From (layer, hidden states, attention mask or None) to the next hidden states, both (rows, length, features)."""
    masked: bool = False
    """Whether `call` reads the attention mask."""


@dataclass(frozen=True)
class Family:
    """Where the models of one family keep their parts, as names of submodules of the headless model."""

    base: str
    """The headless model's own name inside a model with a head."""
    embeddings: tuple[str, ...]
    layers: str
    after: tuple[str, ...]
    """The submodules that come after the last layer, those of them that a model has."""
    embed: Callable[[Any, dict[str, Any]], Tensor]
    """From (headless model, inputs) to hidden states (rows, length, features)."""
    halves: tuple[HalfLayer, HalfLayer]
    final_norm: str | None = None
    """The normalisation of the last hidden states, where the last layer does not end with one."""
    causal: bool = False
    """Whether a token attends to earlier tokens only."""


@dataclass(frozen=True)
class Head:
    """What a model of one class has after the headless model."""

    call: Callable[[Any, Tensor], dict[str, Tensor]]
    """From (model, last hidden states) to the entries of the output beside `last_hidden_state`."""
    uses: tuple[str, ...] = ()
    """The submodules of the model that `call` reads, beside those of the headless model; empty for a headless model."""


def pooler_output(model: Any, hidden: Tensor) -> dict[str, Tensor]:
    """The output of a headless model's pooler, (rows, features), where it has one."""
    return {"pooler_output": model.pooler(hidden)} if getattr(model, "pooler", None) is not None else {}


def logits_of(name: str) -> Head:
    """A head that is one submodule, which maps all hidden states to logits."""
    return Head(lambda model, hidden: {"logits": getattr(model, name)(hidden)}, (name,))
