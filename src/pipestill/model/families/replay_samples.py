"""Makes small inputs for a Hugging Face model from its config, on which its layers are found and its blocks are verified."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.errors import ModelError

ROWS, LENGTH = 2, 12
_MASKS = {"attention_mask": "input_ids", "decoder_attention_mask": "decoder_input_ids"}
_IDS = ("input_ids", "decoder_input_ids")
_PADDED = 5
"""How many tokens of the second row are padding in padded samples."""


def default_inputs(model: nn.Module, config: Any) -> dict[str, Tensor]:
    """Inputs for a model of which nothing is known but its config: ids and masks, images, or sound."""
    main = getattr(model, "main_input_name", "input_ids")
    inputs: dict[str, Tensor] = {}
    if main == "input_ids":
        inputs |= {"input_ids": _ids(config), "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.int64)}
    elif main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 32) or 32
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        inputs["pixel_values"] = _noise(ROWS, getattr(vision, "num_channels", 3), height, width)
    elif main == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 8)
        inputs["input_features"] = _noise(ROWS, config.num_mel_bins, frames)
    elif main == "input_values":
        inputs["input_values"] = _noise(ROWS, 2000)
    else:
        inputs |= dict(model.dummy_inputs)  # type: ignore[arg-type]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = _ids(config)
    return inputs


def padded_samples(inputs: Mapping[str, Any], config: Any) -> dict[str, dict[str, Any]]:
    """Inputs of the same names and kinds as these: without padding, with padding on the right and with padding on the left.

    Ids and their masks are made anew. Of other inputs the first rows are taken as they are, and where there are such the ids
    keep their length. Without ids and masks, the other samples are the same rows in the opposite order.
    """
    few = {name: value[:ROWS] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    tensors = {name for name, value in few.items() if isinstance(value, Tensor)}
    made = {name for name in few if name in (*_IDS, *_MASKS, "position_ids", "decoder_position_ids", "token_type_ids")}
    if not any(_is_text(few.get(name)) for name in _IDS) or any(few[name].dim() != 2 for name in made & tensors):
        return {"on a sample": few, "with rows turned round": {n: few[n].flip(0) if n in tensors else few[n] for n in few}}
    samples = {}
    for side in ("without padding", "padded right", "padded left"):
        samples[side] = dict(few)
        for name in made & tensors:
            rows, length = (ROWS, LENGTH) if made >= tensors else few[name].shape
            samples[side][name] = _value(name, rows, length, side, config, few)
    return samples


def _value(name: str, rows: int, length: int, side: str, config: Any, given: Mapping[str, Any]) -> Tensor:
    """One input of a sample that is padded on a side."""
    padding = torch.zeros(rows, length, dtype=torch.bool)
    pads = min(_PADDED, length - 1)
    if side.startswith("padded") and pads:
        padding[-1, slice(length - pads, None) if side.endswith("right") else slice(pads)] = True
    dtype = given[name].dtype
    if name in _IDS:
        mask_there = any(mask in given for mask, ids in _MASKS.items() if ids == name)
        ids = _ids(config, rows, length)
        return ids.where(~padding, _pad(config)).to(dtype) if mask_there else ids.to(dtype)
    if name in _MASKS:
        return (~padding).to(dtype)
    if "position" in name:
        return torch.arange(length).expand(rows, length).clone().to(dtype)
    some: Tensor = given[name].flatten()[:1]
    return some.expand(rows, length).clone()


def _is_text(value: Any) -> bool:
    """Whether an input is ids of tokens, (rows, length)."""
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def _ids(config: Any, rows: int = ROWS, length: int = LENGTH) -> Tensor:
    """Ids of tokens that have no special meaning for the model, (rows, length)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    special = {value for c in (config, text) for name, value in vars(c).items() if name.endswith(("_token_id", "_token_index"))}
    known = [i for i in range(min(getattr(text, "vocab_size", 100), 200)) if i not in {s for s in special if isinstance(s, int)}]
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(known)[torch.randint(len(known), (rows, length), generator=generator)]


def _pad(config: Any) -> int:
    """The id that fills up rows."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    pad = getattr(text, "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0


def _noise(*shape: int) -> Tensor:
    """Numbers like those of normalised images or sound."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def check_names(model: nn.Module, inputs: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Refuse inputs that make a forward do what blocks cannot: caches, losses, lists of states of all layers."""
    refused = {
        "labels": "give them to the loss, as the batch's target", "past_key_values": "blocks keep no cache",
        "use_cache": "blocks keep no cache", "output_router_logits": "the router's loss is over all layers",
        "output_hidden_states": "they lie in other stages", "output_attentions": "they lie in other stages",
        "return_dict": "blocks pass on a dict",
    }  # fmt: skip
    wrong = [f"{name} ({refused[name]})" for name in inputs if name in refused]
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    wrong += [name for name in inputs if name not in refused and name not in parameters and not any_name]
    if wrong:
        known = [name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD and name not in refused]
        raise ModelError(
            f"the inputs hold {', '.join(wrong)}; the blocks of {type(model).__name__} take {', '.join(known[:12])}; "
            "leave those out"
        )
