"""The blocks of Hugging Face's language models: BERT, RoBERTa, DistilBERT and GPT-2, with their usual heads.

Every model is cut into its embeddings, the attention and the feed-forward network of each layer, and what comes after them. A
layer stays one block where its own call does more than these two (hooks, gradient checkpointing, chunks). The first block
takes what the model does: a dict of `input_ids`, with or without `attention_mask` and `token_type_ids`, or the ids alone.
Between blocks travel the hidden states and the mask as it was given, (rows, length), out of which every attention makes its
own of (rows, 1, length, length). The last block gives a dict with the names of the model's own output: `last_hidden_state`,
and `logits` where the model has a head or `pooler_output` where it has a pooler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.errors import ModelError
from pipestill.model.block import Block

Head = Callable[[nn.Module, Tensor], dict[str, Tensor]]
"""From (model, last hidden states) to what the last block gives beside these."""


@dataclass(frozen=True)
class Half:
    """A layer's attention or feed-forward network: what it is called in the names of blocks, the submodules of the layer that
    it reads, and how it maps hidden states, given a mask where it is `masked`.
    """

    name: str
    uses: tuple[str, ...]
    call: Callable[[nn.Module, Tensor, Tensor | None], Tensor]
    masked: bool = False


@dataclass(frozen=True)
class Family:
    """Where models of one family keep their parts. `base` is the name of the headless model inside one with a head."""

    base: str
    embeddings: tuple[str, ...]
    layers: str
    after: tuple[str, ...]
    embed: Callable[[nn.Module, dict[str, Any]], Tensor]
    halves: tuple[Half, Half]
    causal: bool = False


# -- embeddings, layers and heads -------------------------------------------------------------------------------------


def _embed_bert(base: nn.Module, inputs: dict[str, Any]) -> Tensor:
    given = {name: inputs[name] for name in ("token_type_ids", "position_ids") if inputs.get(name) is not None}
    return base.embeddings(inputs["input_ids"], **given)  # type: ignore[no-any-return, operator]


def _embed_gpt2(base: nn.Module, inputs: dict[str, Any]) -> Tensor:
    ids = inputs["input_ids"]
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    hidden = base.wte(ids) + base.wpe(positions)  # type: ignore[operator]
    return base.drop(hidden)  # type: ignore[no-any-return, operator]


def _layer(layer: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    return layer(hidden, attention_mask=mask)  # type: ignore[no-any-return]


def _attend_bert(layer: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    return layer.attention(hidden, mask)[0]  # type: ignore[no-any-return, operator]


def _feed_bert(layer: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    return layer.output(layer.intermediate(hidden), hidden)  # type: ignore[no-any-return, operator]


def _attend_distilbert(layer: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    return layer.sa_layer_norm(layer.attention(hidden, attention_mask=mask)[0] + hidden)  # type: ignore[no-any-return, operator]


def _feed_distilbert(layer: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    return layer.output_layer_norm(layer.ffn(hidden) + hidden)  # type: ignore[no-any-return, operator]


def _attend_gpt2(layer: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    return layer.attn(layer.ln_1(hidden), attention_mask=mask)[0] + hidden  # type: ignore[no-any-return, operator]


def _feed_gpt2(layer: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    return hidden + layer.mlp(layer.ln_2(hidden))  # type: ignore[no-any-return, operator]


def _pooled(model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    return {"pooler_output": model.pooler(hidden)} if getattr(model, "pooler", None) is not None else {}  # type: ignore[operator]


def _cls(model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    return {"logits": model.cls(hidden)}  # type: ignore[operator]


def _lm_head(model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    return {"logits": model.lm_head(hidden)}  # type: ignore[operator]


def _classifier(model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    return {"logits": model.classifier(hidden)}  # type: ignore[operator]


def _bert_classes(model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    pooled = model.get_submodule("bert.pooler")(hidden)
    return {"logits": model.classifier(model.dropout(pooled))}  # type: ignore[operator]


def _distilbert_words(model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    inside = model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))  # type: ignore[operator]
    return {"logits": model.vocab_projector(inside)}  # type: ignore[operator]


def _distilbert_classes(model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    pooled = torch.relu(model.pre_classifier(hidden[:, 0]))  # type: ignore[operator]
    return {"logits": model.classifier(model.dropout(pooled))}  # type: ignore[operator]


_HALVES_OF_BERT = (
    Half("attention", ("attention",), _attend_bert, masked=True),
    Half("feed_forward", ("intermediate", "output"), _feed_bert),
)
_HALVES_OF_DISTILBERT = (
    Half("attention", ("attention", "sa_layer_norm"), _attend_distilbert, masked=True),
    Half("feed_forward", ("ffn", "output_layer_norm"), _feed_distilbert),
)
_HALVES_OF_GPT2 = (
    Half("attention", ("ln_1", "attn"), _attend_gpt2, masked=True), Half("feed_forward", ("ln_2", "mlp"), _feed_gpt2),
)  # fmt: skip

_BERT = Family("bert", ("embeddings",), "encoder.layer", ("pooler",), _embed_bert, _HALVES_OF_BERT)
_ROBERTA = Family("roberta", ("embeddings",), "encoder.layer", ("pooler",), _embed_bert, _HALVES_OF_BERT)
_DISTILBERT = Family("distilbert", ("embeddings",), "transformer.layer", (), _embed_bert, _HALVES_OF_DISTILBERT)
_GPT2 = Family("transformer", ("wte", "wpe"), "h", ("ln_f",), _embed_gpt2, _HALVES_OF_GPT2, causal=True)

KNOWN: dict[str, tuple[Family, Head, tuple[str, ...]]] = {
    "BertModel": (_BERT, _pooled, ()),
    "BertForMaskedLM": (_BERT, _cls, ("cls",)),
    "BertForSequenceClassification": (_BERT, _bert_classes, ("classifier",)),
    "RobertaModel": (_ROBERTA, _pooled, ()),
    "RobertaForMaskedLM": (_ROBERTA, _lm_head, ("lm_head",)),
    "RobertaForSequenceClassification": (_ROBERTA, _classifier, ("classifier",)),
    "DistilBertModel": (_DISTILBERT, _pooled, ()),
    "DistilBertForMaskedLM": (
        _DISTILBERT, _distilbert_words, ("vocab_transform", "vocab_layer_norm", "vocab_projector"),
    ),
    "DistilBertForSequenceClassification": (_DISTILBERT, _distilbert_classes, ("pre_classifier", "classifier")),
    "GPT2Model": (_GPT2, _pooled, ()),
    "GPT2LMHeadModel": (_GPT2, _lm_head, ("lm_head",)),
}  # fmt: skip
"""By class: the family, what the head does, and the submodules that it reads beside the headless model's."""


def language_model_blocks(model: nn.Module) -> list[str | Block] | None:
    """The blocks of a language model; None for a class that is not known.

    Raises `ModelError` for a decoder made of a BERT, for cross attention, and for hooks on modules that only hold others:
    blocks would not call them.
    """
    kind = forward_class(model)
    if not kind.__module__.startswith("transformers.models.") or kind.__name__ not in KNOWN:
        return None
    family, head, uses = KNOWN[kind.__name__]
    prefix = "" if kind.__name__.endswith("Model") and "LMHead" not in kind.__name__ else f"{family.base}."
    base = model.get_submodule(prefix.rstrip("."))
    layers, after = base.get_submodule(family.layers), [name for name in family.after if _has(base, name)]
    _refuse(model, family, {"", prefix.rstrip("."), (prefix + family.layers.rpartition(".")[0]).rstrip(".")})
    blocks: list[str | Block] = [
        Block(f"{prefix}embeddings", partial(_first, family, base), tuple(prefix + name for name in family.embeddings))
    ]
    for number, (name, layer) in enumerate(layers.named_children()):
        where = f"{prefix}{family.layers}.{name}"
        assert number == int(name)
        halves = family.halves if _is_its_halves(layer) else (Half("", ("",), _layer, masked=True),)
        for half in halves:
            uses_here = tuple(f"{where}.{use}".rstrip(".") for use in half.uses)
            call = partial(_through, family, base, half, layer)
            blocks.append(Block(f"{where}.{half.name}".rstrip("."), call, uses_here))
    norm = base.get_submodule("ln_f") if family.causal else None
    last = Block(
        "head" if uses or not after else prefix + after[0], partial(_last, head, model, norm),
        (*uses, *(prefix + name for name in after)),
    )  # fmt: skip
    return [*blocks, last]


def forward_class(model: nn.Module) -> type:
    """The class in which a model's `forward` is written: the model's own class, or a base class."""
    return next(kind for kind in type(model).__mro__ if "forward" in vars(kind))


def _is_its_halves(layer: nn.Module) -> bool:
    """Whether the layer's own call does nothing but call its two halves."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not (
        hooked or getattr(layer, "gradient_checkpointing", False) or getattr(layer, "chunk_size_feed_forward", 0)
    )


def _has(base: nn.Module, name: str) -> bool:
    return isinstance(getattr(base, name, None), nn.Module)


def _refuse(model: nn.Module, family: Family, holders: set[str]) -> None:
    """`ModelError` with everything that the blocks would leave out."""
    problems = []
    config: Any = model.config
    if not family.causal and getattr(config, "is_decoder", False):
        problems.append("config.is_decoder is set, and only its encoder can be cut")
    if getattr(config, "add_cross_attention", False):
        problems.append("config.add_cross_attention is set, and the blocks have no other states to attend to")
    for name in sorted(holders):
        holder = model.get_submodule(name)
        if holder._forward_hooks or holder._forward_pre_hooks:
            problems.append(f"'{name or type(model).__name__}' has forward hooks, which the blocks would not call")
    if problems:
        raise ModelError(f"{type(model).__name__}: {'; '.join(problems)}; change that, or pass cuts of your own")


# -- what blocks call -------------------------------------------------------------------------------------------------


def _first(family: Family, base: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Ids (rows, length) and what may come with them -> hidden states (rows, length, features), and the mask."""
    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    known = ("input_ids", "attention_mask") + (() if family.causal else ("token_type_ids", "position_ids"))
    if unknown := sorted(given.keys() - set(known)):
        raise ModelError(f"the inputs hold {', '.join(unknown)}; this model's blocks read {', '.join(known)}")
    value = {"hidden": family.embed(base, given)}
    mask = given.get("attention_mask")
    return value if mask is None else {**value, "mask": mask.bool()}


def _through(
    family: Family, base: nn.Module, half: Half, layer: nn.Module, value: dict[str, Tensor]
) -> dict[str, Tensor]:
    """One layer, or half of one. The mask is made as the model's own forward does, for the attention that its config names."""
    mask = _mask(family, base, value) if half.masked else None
    return {**value, "hidden": half.call(layer, value["hidden"], mask)}


def _mask(family: Family, base: nn.Module, value: dict[str, Tensor]) -> Tensor | None:
    from transformers import masking_utils

    make = masking_utils.create_causal_mask if family.causal else masking_utils.create_bidirectional_mask
    rest = {"past_key_values": None} if family.causal else {}
    mask: Tensor | None = make(
        config=base.config, inputs_embeds=value["hidden"], attention_mask=value.get("mask"), **rest
    )
    return mask


def _last(head: Head, model: nn.Module, norm: nn.Module | None, value: dict[str, Tensor]) -> dict[str, Tensor]:
    hidden = value["hidden"] if norm is None else norm(value["hidden"])
    return {"last_hidden_state": hidden, **head(model, hidden)}
