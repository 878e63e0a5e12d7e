"""Nested values (tuples, lists, dicts and registered classes over tensors), and what is done with all of their tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pipestill.errors import DataError


def distinct_tensors(value: Any) -> list[Tensor]:
    """The tensors of a nest, each once, in order."""
    return list({id(leaf): leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}.values())


def num_rows(value: Any, what: str) -> int:
    """The length of the first axis, which every tensor of a batch shares; `DataError` when they do not."""
    sizes = {leaf.shape[0] if leaf.dim() else None for leaf in distinct_tensors(value)}
    if not sizes:
        kinds = sorted({type(leaf).__name__ for leaf in pytree.tree_leaves(value)})
        raise DataError(f"{what}: expected tensors whose first axis counts samples, got no tensor ({', '.join(kinds)})")
    if any(leaf.layout is not torch.strided for leaf in distinct_tensors(value)):
        raise DataError(f"{what}: expected dense tensors, got a sparse one; make it dense (to_dense())")
    if len(sizes) != 1 or None in sizes:
        raise DataError(
            f"{what}: every tensor's first axis must count the same samples, "
            f"got shapes {[tuple(t.shape) for t in distinct_tensors(value)]}"
        )
    rows = sizes.pop()
    assert rows is not None
    return rows


def rows_of(value: Any, index: slice | Tensor) -> Any:
    """The same nest with only some rows of every tensor."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[index], value)


def copied(value: Any) -> Any:
    """The same nest (aliases kept) over copies of its tensors."""
    copies = {id(t): t.clone().pin_memory() if t.is_pinned() else t.clone() for t in distinct_tensors(value)}
    return pytree.tree_map_only(Tensor, lambda tensor: copies[id(tensor)], value)


def to_device(value: Any, device: torch.device) -> Any:
    """The same nest with every tensor on `device`."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), value)


def describe(value: Any) -> str:
    """Types and shapes of a nest, for messages."""
    shown = pytree.tree_map(
        lambda x: f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else repr(x), value
    )
    return str(shown).replace("'", "")
