"""Where DistilBERT is cut: embeddings, the attention and the feed-forward network of each layer, and the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipestill.model.families.bert import embed
from pipestill.model.families.layout import Family, HalfLayer, Head, pooler_output


def _attention(layer: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Self-attention, its residual and its norm."""
    return layer.sa_layer_norm(layer.attention(hidden, attention_mask=mask)[0] + hidden)  # type: ignore[no-any-return, operator]


def _feed_forward(layer: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The feed-forward network, its residual and its norm."""
    return layer.output_layer_norm(layer.ffn(hidden) + hidden)  # type: ignore[no-any-return, operator]


def _words(model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    """The logits of every token, (rows, length, vocabulary)."""
    inside = model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))  # type: ignore[operator]
    return {"logits": model.vocab_projector(inside)}  # type: ignore[operator]


def _classes(model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    """The logits of classes, (rows, classes), from the first token."""
    pooled = torch.relu(model.pre_classifier(hidden[:, 0]))  # type: ignore[operator]
    return {"logits": model.classifier(model.dropout(pooled))}  # type: ignore[operator]


_HALVES = (
    HalfLayer("attention", ("attention", "sa_layer_norm"), _attention, masked=True),
    HalfLayer("feed_forward", ("ffn", "output_layer_norm"), _feed_forward),
)
DISTILBERT = Family("distilbert", ("embeddings",), "transformer.layer", (), embed, _HALVES)

CLASSES = {
    "DistilBertModel": (DISTILBERT, Head(pooler_output)),
    "DistilBertForMaskedLM": (DISTILBERT, Head(_words, ("vocab_transform", "vocab_layer_norm", "vocab_projector"))),
    "DistilBertForSequenceClassification": (DISTILBERT, Head(_classes, ("pre_classifier", "classifier"))),
}
"""The family and the head of each class of `transformers`."""
