"""Where GPT-2 is cut: embeddings, the attention and the feed-forward network of each layer, the final norm and the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipestill.model.families.layout import Family, HalfLayer, Head, language_model_logits, pooler_output


def _embed(base: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Sum the embeddings of tokens and of their positions, 0 to length - 1."""
    ids = inputs["input_ids"]
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    hidden = base.wte(ids) + base.wpe(positions)  # type: ignore[operator]
    return base.drop(hidden)  # type: ignore[no-any-return, operator]


def _attention(layer: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """A norm, causal self-attention and its residual."""
    return layer.attn(layer.ln_1(hidden), attention_mask=mask)[0] + hidden  # type: ignore[no-any-return, operator]


def _feed_forward(layer: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """A norm, the feed-forward network and its residual."""
    return hidden + layer.mlp(layer.ln_2(hidden))  # type: ignore[no-any-return, operator]


_HALVES = (
    HalfLayer("attention", ("ln_1", "attn"), _attention, masked=True),
    HalfLayer("feed_forward", ("ln_2", "mlp"), _feed_forward),
)
GPT2 = Family("transformer", ("wte", "wpe"), "h", ("ln_f",), _embed, _HALVES, final_norm="ln_f", causal=True)

CLASSES = {
    "GPT2Model": (GPT2, Head(pooler_output)),
    "GPT2LMHeadModel": (GPT2, Head(language_model_logits, ("lm_head",))),
}
"""The family and the head of each class of `transformers`."""
