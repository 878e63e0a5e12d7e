"""How the families whose layers are halved are described: where models keep their parts, and how these are called.

BERT, RoBERTa and DistilBERT are cut into embeddings, the attention and the feed-forward network of each layer, and a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
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


def _bert_embed(base: Any, inputs: dict[str, Any]) -> Tensor:
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


_BERT_HALVES = (
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
    HalfLayer("feed_forward", ("ffn", "output_layer_norm"), lambda layer, h, _: layer.output_layer_norm(layer.ffn(h) + h)),
)
BERT = Family("bert", ("embeddings",), "encoder.layer", ("pooler",), _bert_embed, _BERT_HALVES)
ROBERTA = Family("roberta", ("embeddings",), "encoder.layer", ("pooler",), _bert_embed, _BERT_HALVES)
DISTILBERT = Family("distilbert", ("embeddings",), "transformer.layer", (), _bert_embed, _DISTILBERT_HALVES)


KNOWN = {
    "BertModel": (BERT, Head(pooler_output)),
    "BertForMaskedLM": (BERT, logits_of("cls")),
    "BertForSequenceClassification": (BERT, Head(_bert_classes, ("classifier",))),
    "RobertaModel": (ROBERTA, Head(pooler_output)),
    "RobertaForMaskedLM": (ROBERTA, logits_of("lm_head")),
    "RobertaForSequenceClassification": (ROBERTA, logits_of("classifier")),
    "DistilBertModel": (DISTILBERT, Head(pooler_output)),
    "DistilBertForMaskedLM": (DISTILBERT, Head(_distilbert_words, ("vocab_transform", "vocab_layer_norm", "vocab_projector"))),
    "DistilBertForSequenceClassification": (DISTILBERT, Head(_distilbert_classes, ("pre_classifier", "classifier"))),
}
"""The family and the head of each class of `transformers` that can be cut."""
