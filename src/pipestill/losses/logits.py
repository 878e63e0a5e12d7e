"""Logits as losses take them: given, or still to be computed from hidden states and a linear head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipestill.arguments import one_of, raise_problems, real_number
from pipestill.errors import ModelError


@dataclass(frozen=True, eq=False)
class LinearLogits:
    """Logits that nobody has computed: softcap * tanh(scale * (hidden @ weight.T + bias) / softcap).

    Losses of `ps.losses` take it wherever they take logits. They compute it over a chunk of tokens at a time, with its
    gradients, so that no tensor of (tokens, vocabulary) is ever held.

    Args:
        hidden: what the head takes, (rows, ..., features).
        weight: the head's weight, (vocabulary, features).
        bias: the head's bias, (vocabulary,), or None.
        scale: a factor of the logits.
        softcap: what bounds the logits, above 0, or None for logits without bound.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        raise_problems(
            (
                *one_of("hidden", self.hidden, Tensor, "a tensor, (rows, ..., features)"),
                *one_of("weight", self.weight, Tensor, "a tensor, (vocabulary, features)"),
                *real_number("scale", self.scale),
                *(() if self.softcap is None else real_number("softcap", self.softcap, above=0)),
            )
        )
        vocabulary, features = self.weight.shape if self.weight.dim() == 2 else (-1, -1)
        if self.hidden.dim() < 2 or self.hidden.shape[-1] != features:
            raise ModelError(
                f"a head with the weight {tuple(self.weight.shape)}, (vocabulary, features), cannot take hidden states "
                f"{tuple(self.hidden.shape)}; expected (rows, ..., features)"
            )
        if self.bias is not None and self.bias.shape != (vocabulary,):
            raise ModelError(f"the head's bias is {tuple(self.bias.shape)}; expected ({vocabulary},)")

    @property
    def shape(self) -> torch.Size:
        """The shape that the logits would have, (rows, ..., vocabulary)."""
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))


Logits = Tensor | LinearLogits
"""Logits of (rows, ..., vocabulary), given or not yet computed."""


def logits_of(output: Any) -> Logits:
    """The logits in a model's output: the output itself, or what a mapping holds as `logits`.

    Args:
        output: a tensor, a `LinearLogits`, or a mapping with either as `logits`.

    Raises:
        ModelError: it is something else.
    """
    found = output.get("logits") if isinstance(output, Mapping) else output
    if not isinstance(found, (Tensor, LinearLogits)):
        came = f"a mapping of {', '.join(map(str, output))}" if isinstance(output, Mapping) else type(output).__name__
        raise ModelError(f"a loss of logits got {came}; expected logits, (rows, ..., vocabulary), or a mapping with 'logits'")
    if isinstance(found, Tensor) and (not found.is_floating_point() or found.dim() == 0):
        raise ModelError(f"logits are {found.dtype} of {tuple(found.shape)}; expected floating numbers, (rows, ..., vocabulary)")
    return found
