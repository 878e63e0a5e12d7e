"""Lets models run whose tensors have no content (PyTorch's meta device), where they ask for a number."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class WithoutNumbers(TorchFunctionMode):
    """A mode in which tensors without content answer for their numbers, and attention is done as GPUs do it.

    A model that asks a tensor for a number gets 1, and False where it asks a question: a mask is taken to leave something
    out. Attention is one kernel that keeps no matrix of weights (Rabe and Staats 2021; Dao et al. 2022, FlashAttention).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of PyTorch, or answer in its place."""
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        if func in _QUESTIONS and args[0].is_meta:
            return _QUESTIONS[func]
        return func(*args, **(kwargs or {}))


_QUESTIONS: dict[Any, Any] = {
    Tensor.__bool__: False, Tensor.__int__: 1, Tensor.__index__: 1, Tensor.__float__: 1.0, Tensor.item: 1,
}  # fmt: skip


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention in one kernel, with the arguments of `F.scaled_dot_product_attention`."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(groups, -3) for tensor in (key, value))
    if attn_mask is not None:
        full = (*query.shape[:-1], key.shape[-2])
        attn_mask = attn_mask.to(query.dtype).expand(full)
    trained = any(tensor.requires_grad for tensor in (query, key, value))
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, trained, dropout_p, is_causal, scale=scale
    )[0]
    return out
