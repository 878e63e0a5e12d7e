"""Marks tensors by where they come from, and passes the marks on to whatever is computed from them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pipestill.model.nests import memory_of

RANDOM = "random numbers"
"""The mark of tensors that random numbers went into."""
_aten = torch.ops.aten
_READ_SHAPES_ONLY = {
    _aten.empty_like, _aten.zeros_like, _aten.ones_like, _aten.full_like,
    _aten.new_empty, _aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.new_empty_strided,
}  # fmt: skip


class Marks(TorchDispatchMode):
    """A mode in which every operator's outputs get the marks of its inputs.

    Marks belong to memory, not to tensors: a view has those of its base, and the base those of what was written to a view.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._marks: dict[int, frozenset[str]] = {}
        self._kept: list[Tensor] = []  # so that no other tensor gets the memory of a marked one
        self._watched: dict[int, str] = {}
        self.seen: set[str] = set()
        """The names of watched tensors that an operator has read since this set was last emptied."""

    def mark(self, tensors: Iterable[Tensor], marks: Iterable[str]) -> None:
        """Add marks to the memory of some tensors."""
        for tensor in tensors:
            key = memory_of(tensor)
            self._marks[key] = self._marks.get(key, frozenset()) | frozenset(marks)
            self._kept.append(tensor)

    def watch(self, name: str, tensor: Tensor) -> None:
        """Note in `seen` when an operator reads this very tensor."""
        self._watched[id(tensor)] = name
        self._kept.append(tensor)

    def of(self, tensor: Tensor) -> frozenset[str]:
        """The marks of a tensor."""
        return self._marks.get(memory_of(tensor), frozenset())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run one operator and mark what it gives."""
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.seen |= {self._watched[id(tensor)] for tensor in given if id(tensor) in self._watched}
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _READ_SHAPES_ONLY:
            return result
        marks = frozenset[str]().union(*(self.of(tensor) for tensor in given))
        if torch.Tag.nondeterministic_seeded in func.tags:
            marks |= {RANDOM}
        if marks:
            self.mark((leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)), marks)
        return result
