"""Counts the bytes of the tensors that live at one time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pipestill.model.nests import memory_of


class LiveBytes(TorchDispatchMode):
    """A context that counts the bytes of all living tensors made by this thread's operators in it, now and at their peak.

    Memory that an operator needs inside, and frees before it ends, is not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        """The memory that is counted now, by a number that tells pieces of memory apart."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator and count the memory that it makes."""
        given = {memory_of(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and memory_of(leaf) not in given and memory_of(leaf) not in self._known:
                storage = leaf.untyped_storage()
                self._known[memory_of(leaf)] = weakref.ref(
                    storage, partial(self._forget, memory_of(leaf), storage.nbytes())
                )
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result

    def leave_out(self, tensor: Tensor) -> None:
        """Stop counting a tensor that lives on."""
        if memory_of(tensor) in self._known:
            self._forget(memory_of(tensor), tensor.untyped_storage().nbytes(), None)

    def _forget(self, key: int, num_bytes: int, _: object) -> None:
        """Subtract memory that was freed."""
        if self._known.pop(key, None) is not None:
            self.now -= num_bytes
