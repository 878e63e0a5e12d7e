"""Functions on nests: tensors, and tuples, lists, dicts and classes known to PyTorch's pytree that hold tensors.

A batch's inputs, a batch's targets and the value between two blocks are nests. Two places of a nest may hold the same tensor
(an alias); functions that make new tensors keep such places alike.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pipestill.errors import DataError


def distinct_tensors(value: Any) -> list[Tensor]:
    """List the tensors of a nest in its order, aliases once."""
    return list({id(leaf): leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}.values())


def watched(value: Any) -> Callable[[], bool]:
    """Watch a nest. The result tells whether one of its tensors, or a view of one, was written to in place since."""
    versions = [(tensor, tensor._version) for tensor in distinct_tensors(value)]
    return lambda: any(tensor._version != version for tensor, version in versions)


def memory_of(tensor: Tensor) -> int:
    """A number that tells pieces of memory apart while they live, on the meta device too, where all addresses are 0."""
    return int(tensor.untyped_storage()._cdata)


def num_rows(value: Any, what: str) -> int:
    """Count the rows of a batch: the size of the first axis, which all of its tensors share.

    Raises `DataError`, which begins with `what`, for a batch without dense tensors or whose tensors differ in their rows.
    """
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


def num_bytes(value: Any) -> int:
    """The bytes of a nest's distinct tensors."""
    return sum(tensor.nbytes for tensor in distinct_tensors(value))


def rows_of(value: Any, index: slice | Tensor) -> Any:
    """Select the same rows of every tensor of a nest."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[index], value)


def copied(value: Any) -> Any:
    """Copy a nest and its tensors, pinned ones into pinned memory."""
    copies = {id(t): t.clone().pin_memory() if t.is_pinned() else t.clone() for t in distinct_tensors(value)}
    return pytree.tree_map_only(Tensor, lambda tensor: copies[id(tensor)], value)


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor of a nest to `device`; from pinned memory the host does not wait for it."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), value)


def describe(value: Any) -> str:
    """Describe a nest for messages: types and shapes in place of tensors, as in `(float32[8, 3], int64[8])`."""
    shown = pytree.tree_map(
        lambda x: f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else repr(x), value
    )
    return str(shown).replace("'", "")
