"""Hashes of a teacher and of a tokenizer: a cache is of one teacher, and wrong for any other."""

import json
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.arguments import shown
from pipestill.errors import ConfigError, ModelError

_PASSING = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures", "auto_map")
"""Settings of a config that do not change what a model computes, or that its weights tell."""


def teacher_hash(teacher: nn.Module) -> str:
    """Hash a teacher: its weights and buffers, and its config or, where it has none, its structure.

    It takes about a second for 4 GB on four cores.

    Args:
        teacher: the model, with its weights.

    Raises:
        ModelError: it is no model, or its weights are not there (the meta device).
    """
    if not isinstance(teacher, nn.Module):
        raise ModelError(f"teacher is {shown(teacher)}; expected an nn.Module")
    tensors = {**dict(teacher.named_parameters(remove_duplicate=False)), **dict(teacher.named_buffers(remove_duplicate=False))}
    if absent := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ModelError(f"the teacher's '{absent[0]}' is on the meta device, without values; load its weights first")
    places = {name: (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) for name, tensor in tensors.items()}
    distinct = {places[name]: tensor for name, tensor in tensors.items()}
    with ThreadPoolExecutor() as threads:  # blake2b runs outside the interpreter's lock
        digests = dict(zip(distinct, threads.map(_tensor_digest, distinct.values()), strict=True))
    found = blake2b(_structure(teacher).encode(), digest_size=16)
    for name in sorted(tensors):
        found.update(name.encode() + digests[places[name]])
    return found.hexdigest()


def _tensor_digest(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous()
    found = blake2b(f"{values.dtype} {tuple(values.shape)}".encode(), digest_size=16)
    if values.numel():
        found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()


def _structure(teacher: nn.Module) -> str:
    """What a model is beside its tensors, as text."""
    to_dict = getattr(getattr(teacher, "config", None), "to_dict", None)
    if to_dict is None:
        return str(teacher)
    settings = {name: value for name, value in to_dict().items() if name not in _PASSING}
    return type(teacher).__name__ + json.dumps(settings, sort_keys=True, default=str)


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash what a tokenizer's numbers stand for: its words, added ones too.

    How it divides, pads or cuts text, and how it writes chats, is not part of it: samples are known by the tokens that came out.

    Args:
        tokenizer: one of `transformers` or of `tokenizers`.

    Raises:
        ConfigError: it is neither.
    """
    if not callable(getattr(tokenizer, "get_vocab", None)):
        raise ConfigError(f"tokenizer is {shown(tokenizer)}; expected one of transformers or of tokenizers")
    words = sorted((number, word) for word, number in tokenizer.get_vocab().items())
    return blake2b(json.dumps(words).encode(), digest_size=16).hexdigest()
