"""Cuts Hugging Face's BERT, RoBERTa and DistilBERT into half layers; all other models of that library are cut by `replay`.

A model is cut into its embeddings, the attention and the feed-forward network of each layer, and what comes after the layers.
A layer stays one block where its own call does more than these two (hooks, gradient checkpointing, chunks). The first block
takes what the model does: a dict of `input_ids`, with or without `attention_mask` and `token_type_ids`, or the ids alone.
Between blocks travel the hidden states, (rows, length, features), and the mask as it was given, (rows, length); every
attention makes its own mask of (rows, 1, length, length) from that. The last block returns a dict with the names of the
model's own output: `last_hidden_state`, and `logits` where the model has a head or `pooler_output` where it has a pooler.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from pipestill.errors import ModelError
from pipestill.model.block import Block
from pipestill.model.families.language_families import KNOWN, Family, HalfLayer, Head

_WHOLE_LAYER = HalfLayer("", ("",), lambda layer, hidden, mask: layer(hidden, attention_mask=mask), masked=True)
"""A layer that cannot be halved, called as one."""


def language_model_blocks(model: nn.Module) -> list[str | Block] | None:
    """The blocks of a BERT-like model of `transformers`; None for a class that is not known.

    None also for a decoder made of a BERT, for cross attention, and for hooks on modules that only hold others, which these
    blocks would not call.
    """
    kind = forward_class(model)
    if not kind.__module__.startswith("transformers.models.") or kind.__name__ not in KNOWN:
        return None
    family, head = KNOWN[kind.__name__]
    prefix = f"{family.base}." if head.uses else ""
    base = model.get_submodule(prefix.rstrip("."))
    after = [name for name in family.after if isinstance(getattr(base, name, None), nn.Module)]
    if _does_more(model, {"", prefix.rstrip("."), (prefix + family.layers.rpartition(".")[0]).rstrip(".")}):
        return None
    blocks: list[str | Block] = [
        Block(f"{prefix}embeddings", partial(_first, family, base), tuple(prefix + name for name in family.embeddings))
    ]
    for number, (name, layer) in enumerate(base.get_submodule(family.layers).named_children()):
        where = f"{prefix}{family.layers}.{name}"
        assert number == int(name)
        for half in family.halves if _is_its_halves(layer) else (_WHOLE_LAYER,):
            uses = tuple(f"{where}.{use}".rstrip(".") for use in half.uses)
            blocks.append(Block(f"{where}.{half.name}".rstrip("."), partial(_through, base, half, layer), uses))
    end = "head" if head.uses or not after else prefix + after[0]
    uses = (*head.uses, *(prefix + name for name in after))
    return [*blocks, Block(end, partial(_last, head, model), uses)]


def forward_class(model: nn.Module) -> type:
    """The class in which a model's `forward` is written: the model's own class, or a base class."""
    return next(kind for kind in type(model).__mro__ if "forward" in vars(kind))


def _is_its_halves(layer: nn.Module) -> bool:
    """Whether the layer's own call does nothing but call its two halves."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not (hooked or getattr(layer, "gradient_checkpointing", False) or getattr(layer, "chunk_size_feed_forward", 0))


def _does_more(model: nn.Module, holders: set[str]) -> bool:
    """Whether a model does what its blocks would leave out. `holders`: modules whose own call no block makes."""
    config: Any = model.config
    hooked = [h for h in map(model.get_submodule, holders) if h._forward_hooks or h._forward_pre_hooks]
    return bool(hooked or getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False))


# -- the blocks' calls ------------------------------------------------------------------------------------------------


def _first(family: Family, base: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Embed ids (rows, length). Returns the hidden states (rows, length, features), and the mask where one is given."""
    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    known = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    if unknown := sorted(given.keys() - set(known)):
        raise ModelError(f"the inputs hold {', '.join(unknown)}; this model's blocks read {', '.join(known)}")
    value = {"hidden": family.embed(base, given)}
    mask = given.get("attention_mask")
    return value if mask is None else {**value, "mask": mask.bool()}


def _through(base: nn.Module, half: HalfLayer, layer: nn.Module, value: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run half a layer, or a whole one, on the hidden states."""
    mask = _mask(base, value) if half.masked else None
    return {**value, "hidden": half.call(layer, value["hidden"], mask)}


def _mask(base: nn.Module, value: dict[str, Tensor]) -> Tensor | None:
    """Make the mask as the model's own forward does, for the kind of attention that its config names."""
    from transformers import masking_utils

    make = masking_utils.create_bidirectional_mask
    mask: Tensor | None = make(config=base.config, inputs_embeds=value["hidden"], attention_mask=value.get("mask"))
    return mask


def _last(head: Head, model: nn.Module, value: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the head."""
    return {"last_hidden_state": value["hidden"], **head.call(model, value["hidden"])}
