"""Where the logits of a chunk of tokens come from, and where their gradients go: tensors of logits, or a linear head."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipestill.losses.logits import LinearLogits, Logits

Tokens = Tensor | slice
"""Some tokens of a batch: consecutive ones, or their numbers."""


@dataclass(frozen=True)
class Head:
    """How a linear head makes logits of hidden states."""

    scale: float
    softcap: float | None
    dtype: torch.dtype
    """The type of its products: autocast's inside autocast, else the weight's."""


def head_of(logits: Logits) -> Head | None:
    """Describe the head of logits that are not computed yet; None for logits that are given."""
    if isinstance(logits, Tensor):
        return None
    device = logits.weight.device.type
    low = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and logits.weight.dtype != torch.float64
    return Head(logits.scale, logits.softcap, torch.get_autocast_dtype(device) if low else logits.weight.dtype)


def tensors_of(logits: Logits) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """List the tensors that logits are made of: values (the logits or hidden states), weight and bias."""
    return (logits.hidden, logits.weight, logits.bias) if isinstance(logits, LinearLogits) else (logits, None, None)


class Source:
    """Logits of one model, chunk by chunk, with the gradients that they get."""

    def __init__(self, head: Head | None, tensors: Sequence[Tensor | None], wanted: Sequence[bool], vocabulary: int) -> None:
        values, weight, bias = tensors
        assert values is not None
        self.head = head
        self.shape = values.shape
        self.values = values.reshape(-1, values.shape[-1])
        """The logits or hidden states, (tokens, ...)."""
        self.vocabulary = vocabulary
        """How many of the logits are read, the first ones."""
        self.weight = None if weight is None or head is None else weight[:vocabulary].to(head.dtype)
        self.bias = None if bias is None or head is None else bias[:vocabulary].to(head.dtype)
        self.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        self.of_values = torch.zeros_like(self.values) if wanted[0] else None
        self.of_weight = _zeros(weight) if weight is not None and wanted[1] else None
        self.of_bias = _zeros(bias) if bias is not None and wanted[2] else None

    def logits(self, tokens: Tokens) -> Tensor:
        """Compute the logits of a chunk, (tokens, vocabulary)."""
        some = self.values[tokens] if isinstance(tokens, slice) else self.values.index_select(0, tokens)
        if self.head is None or self.weight is None:
            return some[:, : self.vocabulary]
        logits = F.linear(some.to(self.head.dtype), self.weight, self.bias)
        if self.head.scale != 1.0:
            logits.mul_(self.head.scale)
        if self.head.softcap is not None:
            logits.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return logits

    def room(self, tokens: Tokens, logits: Tensor) -> Tensor | None:
        """Find where the gradient by a chunk's logits goes until `add`; None where none is wanted. It may be `logits` itself."""
        if self.of_values is None and self.of_weight is None and self.of_bias is None:
            return None
        if self.head is not None:
            return logits
        assert self.of_values is not None
        return self.of_values[tokens, : self.vocabulary] if isinstance(tokens, slice) else torch.empty_like(logits)

    def before_cap(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turn the gradient by some logits, in place, into that by the head's product; both (tokens, vocabulary)."""
        if self.head is not None and self.head.softcap is not None:
            gradient.mul_(1.0 - (logits.double() / self.head.softcap).square_())
        return gradient.mul_(self.head.scale) if self.head is not None and self.head.scale != 1.0 else gradient

    def add(self, tokens: Tokens, gradient: Tensor) -> None:
        """Take the gradient by the logits of a chunk, or by the head's product, which `room` holds."""
        if self.head is None or self.weight is None:
            if isinstance(tokens, Tensor) and self.of_values is not None:
                self.of_values[:, : self.vocabulary].index_copy_(0, tokens, gradient)
            return
        if self.of_values is not None:
            self.of_values[tokens] = (gradient @ self.weight).to(self.of_values.dtype)
        if self.of_weight is not None:
            part, some = self.of_weight[: self.vocabulary], self.values[tokens].to(gradient.dtype)
            if part.dtype == gradient.dtype:
                part.addmm_(gradient.T, some)
            else:
                part.add_(gradient.T @ some)
        if self.of_bias is not None:
            self.of_bias[: self.vocabulary] += gradient.sum(0, dtype=self.of_bias.dtype)

    def gradients(self) -> list[Tensor | None]:
        """List the gradients in the shapes and types of the tensors; None for those that are not wanted."""
        whole = None if self.of_values is None else self.of_values.view(self.shape)
        pairs = zip((whole, self.of_weight, self.of_bias), self.dtypes, strict=True)
        return [None if gradient is None or dtype is None else gradient.to(dtype) for gradient, dtype in pairs]


def _zeros(tensor: Tensor) -> Tensor:
    """Make room for a gradient that adds up over chunks: at least float32, as bfloat16 would lose what later chunks add."""
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
