"""Where BERT, RoBERTa and DistilBERT are cut: embeddings, attention and feed-forward network of each layer, and the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipestill.model.families.layout import Family, HalfLayer, Head, logits_of, pooler_output


def _embed(base: Any, inputs: dict[str, Any]) -> Tensor:
    """Sum the embeddings of tokens, and of token types and positions where these are given."""
    given = {name: inputs[name] for name in ("token_type_ids", "position_ids") if inputs.get(name) is not None}
    return base.embeddings(inputs["input_ids"], **given)  # type: ignore[no-any-return]


def _bert_classes(model: Any, hidden: Tensor) -> dict[str, Tensor]:
    """The logits of classes, (rows, classes), from the pooled first token."""
    return {"logits": model.classifier(model.dropout(model.bert.pooler(hidden)))}


def _distilbert_words(model: Any, hidden: Tensor) -> dict[str, Tensor]:
    """The logits of every token, (rows, length, vocabulary)."""
    return {"logits": model.vocab_projector(model.vocab_layer_norm(model.activation(model.vocab_transform(hidden))))}


def _distilbert_classes(model: Any, hidden: Tensor) -> dict[str, Tensor]:
    """The logits of classes, (rows, classes), from the first token."""
    return {"logits": model.classifier(model.dropout(torch.relu(model.pre_classifier(hidden[:, 0]))))}


_HALVES = (
    HalfLayer("attention", ("attention",), lambda layer, h, mask: layer.attention(h, mask)[0], masked=True),
    HalfLayer("feed_forward", ("intermediate", "output"), lambda layer, h, _: layer.output(layer.intermediate(h), h)),
)
_DISTILBERT_HALVES = (
    HalfLayer(
        "attention",
        ("attention", "sa_layer_norm"),
        lambda layer, h, mask: layer.sa_layer_norm(layer.attention(h, attention_mask=mask)[0] + h),
        masked=True,
    ),
    HalfLayer(
        "feed_forward", ("ffn", "output_layer_norm"), lambda layer, h, _: layer.output_layer_norm(layer.ffn(h) + h)
    ),
)
BERT = Family("bert", ("embeddings",), "encoder.layer", ("pooler",), _embed, _HALVES)
ROBERTA = Family("roberta", ("embeddings",), "encoder.layer", ("pooler",), _embed, _HALVES)
DISTILBERT = Family("distilbert", ("embeddings",), "transformer.layer", (), _embed, _DISTILBERT_HALVES)

CLASSES = {
    "BertModel": (BERT, Head(pooler_output)),
    "BertForMaskedLM": (BERT, logits_of("cls")),
    "BertForSequenceClassification": (BERT, Head(_bert_classes, ("classifier",))),
    "RobertaModel": (ROBERTA, Head(pooler_output)),
    "RobertaForMaskedLM": (ROBERTA, logits_of("lm_head")),
    "RobertaForSequenceClassification": (ROBERTA, logits_of("classifier")),
    "DistilBertModel": (DISTILBERT, Head(pooler_output)),
    "DistilBertForMaskedLM": (
        DISTILBERT, Head(_distilbert_words, ("vocab_transform", "vocab_layer_norm", "vocab_projector")),
    ),
    "DistilBertForSequenceClassification": (DISTILBERT, Head(_distilbert_classes, ("pre_classifier", "classifier"))),
}  # fmt: skip
"""The family and the head of each class of `transformers`."""
