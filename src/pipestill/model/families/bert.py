"""Where BERT and RoBERTa are cut: embeddings, the attention and the feed-forward network of each layer, and the head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pipestill.model.families.layout import Family, HalfLayer, Head, language_model_logits, pooler_output


def embed(base: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Sum the embeddings of tokens, and of token types and positions where these are given."""
    given = {name: inputs[name] for name in ("token_type_ids", "position_ids") if inputs.get(name) is not None}
    return base.embeddings(inputs["input_ids"], **given)  # type: ignore[no-any-return, operator]


def _attention(layer: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Self-attention, its residual and its norm."""
    return layer.attention(hidden, mask)[0]  # type: ignore[no-any-return, operator]


def _feed_forward(layer: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The feed-forward network, its residual and its norm."""
    return layer.output(layer.intermediate(hidden), hidden)  # type: ignore[no-any-return, operator]


def _bert_words(model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    """The logits of every token, (rows, length, vocabulary)."""
    return {"logits": model.cls(hidden)}  # type: ignore[operator]


def _bert_classes(model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    """The logits of classes, (rows, classes), from the pooled first token."""
    pooled = model.get_submodule("bert.pooler")(hidden)
    return {"logits": model.classifier(model.dropout(pooled))}  # type: ignore[operator]


def _roberta_classes(model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    """The logits of classes, (rows, classes); the classifier picks the first token itself."""
    return {"logits": model.classifier(hidden)}  # type: ignore[operator]


_HALVES = (
    HalfLayer("attention", ("attention",), _attention, masked=True),
    HalfLayer("feed_forward", ("intermediate", "output"), _feed_forward),
)
BERT = Family("bert", ("embeddings",), "encoder.layer", ("pooler",), embed, _HALVES)
ROBERTA = Family("roberta", ("embeddings",), "encoder.layer", ("pooler",), embed, _HALVES)

CLASSES = {
    "BertModel": (BERT, Head(pooler_output)),
    "BertForMaskedLM": (BERT, Head(_bert_words, ("cls",))),
    "BertForSequenceClassification": (BERT, Head(_bert_classes, ("classifier",))),
    "RobertaModel": (ROBERTA, Head(pooler_output)),
    "RobertaForMaskedLM": (ROBERTA, Head(language_model_logits, ("lm_head",))),
    "RobertaForSequenceClassification": (ROBERTA, Head(_roberta_classes, ("classifier",))),
}
"""The family and the head of each class of `transformers`."""
