"""Keys of samples: what identifies the inputs that a teacher has seen, whatever batch, row or padding they were in.

A key has four whole numbers a token. The first two are a hash of the sample's inputs, without padding. The third is a hash of
the place that the sample is from, to notice that the inputs of one place have changed. The fourth says which token of how many
this is, so that a packed row tells where its samples begin, and a sample that was cut is noticed. All are 0 for padding.
"""

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from pipestill.data import Example
from pipestill.errors import DataError

SAMPLE = "sample"
"""The name of the keys among a batch's targets, (rows, ..., 4), int64."""
_LENGTH_BITS = 32

Key = tuple[int, int]
"""The hash of a sample's inputs."""


def content_key(inputs: Any) -> Key:
    """Hash the inputs of one sample: a nest of tensors without an axis of rows, or the tokens of an example.

    Whole numbers of any type have the hash of int64, so that it does not depend on how tokens are held.
    """
    found = blake2b(digest_size=16)
    for path, leaf in sorted(_leaves(inputs, ""), key=lambda pair: pair[0]):
        found.update(path.encode())
        if not isinstance(leaf, Tensor):
            found.update(repr(leaf).encode())
            continue
        whole = not leaf.is_floating_point() and not leaf.is_complex() and leaf.dtype is not torch.bool
        tensor = (leaf.detach().cpu().long() if whole else leaf.detach().cpu()).contiguous()
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return _words(found.digest())


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Everything in a nest, each with a name that does not depend on versions of packages."""
    if isinstance(value, Mapping):
        for name in value:
            yield from _leaves(value[name], f"{path}.{name}")
    elif isinstance(value, (tuple, list)):
        for number, one in enumerate(value):
            yield from _leaves(one, f"{path}[{number:09}]")
    else:
        yield path, value


def place_key(place: str) -> int:
    """Hash the place that a sample is from; never 0."""
    return _words(blake2b(place.encode(), digest_size=16).digest())[0] or 1


def _words(digest: bytes) -> Key:
    first, second = (int.from_bytes(digest[i : i + 8], "big", signed=True) for i in (0, 8))
    return (first or 1), second


def key_of(example: Example) -> Key:
    """The hash of an example's tokens."""
    return content_key(example.input_ids)


def columns(key: Key, place: int, length: int) -> Tensor:
    """The keys of the tokens of one sample, (length, 4)."""
    result = torch.empty(length, 4, dtype=torch.int64)
    result[:, 0], result[:, 1], result[:, 2] = key[0], key[1], place
    result[:, 3] = torch.arange(length) | (length << _LENGTH_BITS)
    return result


def complete_samples(keys: Tensor) -> list[tuple[Key, int, int, int]]:
    """Find the samples of which every token is there: the key, the place, the first token and their number.

    `keys` is (rows, ..., 4); tokens are counted over all rows, and a sample lies within one row.
    """
    row_length = keys.shape[1] if keys.dim() == 3 else 1
    flat = keys.reshape(-1, 4).cpu()
    offsets, lengths = flat[:, 3] & ((1 << _LENGTH_BITS) - 1), flat[:, 3] >> _LENGTH_BITS
    found = []
    for start in ((offsets == 0) & (lengths > 0)).nonzero().squeeze(-1).tolist():
        length = int(lengths[start])
        end = start + length
        if start % row_length + length > row_length:
            continue
        same = (flat[start:end, :3] == flat[start, :3]).all() and offsets[start:end].equal(torch.arange(length))
        if same:
            a, b, place, _ = flat[start].tolist()
            found.append(((a, b), place, start, length))
    return found


def keys_of(target: Any) -> Tensor:
    """The keys among a batch's targets; `DataError` where there are none."""
    keys = target.get(SAMPLE) if isinstance(target, Mapping) else None
    if not isinstance(keys, Tensor) or keys.shape[-1:] != (4,):
        raise DataError(
            "the batch's targets have no keys of samples, by which a teacher cache tells them apart; give the loader "
            "ps.cache.keyed(dataset) in place of its data set"
        )
    return keys
