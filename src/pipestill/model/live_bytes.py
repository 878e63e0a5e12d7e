"""Counts the bytes of tensors while they live."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Inside the context: bytes of all tensors that this thread's operators have made and that still live, and their peak.

    What an operator needs inside, and frees before it ends, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {_key(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and _key(leaf) not in given and _key(leaf) not in self._known:
                storage = leaf.untyped_storage()
                self._known[_key(leaf)] = weakref.ref(storage, partial(self._forget, _key(leaf), storage.nbytes()))
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result

    def leave_out(self, tensor: Tensor) -> None:
        """Count a tensor no longer, though it lives on."""
        if _key(tensor) in self._known:
            self._forget(_key(tensor), tensor.untyped_storage().nbytes(), None)

    def _forget(self, key: int, num_bytes: int, _: object) -> None:
        if self._known.pop(key, None) is not None:
            self.now -= num_bytes


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
