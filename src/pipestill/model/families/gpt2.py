"""Where GPT-2 is cut: embeddings, the attention and the feed-forward network of each layer, the final norm and the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipestill.model.families.layout import Family, HalfLayer, Head, logits_of, pooler_output


def _embed(base: Any, inputs: dict[str, Any]) -> Tensor:
    """Sum the embeddings of tokens and of their positions, 0 to length - 1."""
    ids = inputs["input_ids"]
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    return base.drop(base.wte(ids) + base.wpe(positions))  # type: ignore[no-any-return]


_HALVES = (
    HalfLayer(
        "attention",
        ("ln_1", "attn"),
        lambda layer, h, mask: layer.attn(layer.ln_1(h), attention_mask=mask)[0] + h,
        masked=True,
    ),
    HalfLayer("feed_forward", ("ln_2", "mlp"), lambda layer, h, _: h + layer.mlp(layer.ln_2(h))),
)
GPT2 = Family("transformer", ("wte", "wpe"), "h", ("ln_f",), _embed, _HALVES, final_norm="ln_f", causal=True)

CLASSES = {"GPT2Model": (GPT2, Head(pooler_output)), "GPT2LMHeadModel": (GPT2, logits_of("lm_head"))}
"""The family and the head of each class of `transformers`."""
