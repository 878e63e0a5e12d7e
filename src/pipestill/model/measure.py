"""Measures seconds of finished work, on the CPU and on GPUs, what an optimizer's steps take, and the bytes of living tensors."""

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pipestill.model.nests import memory_of, num_bytes
from pipestill.optim import OptimizerFactory

Seconds = dict[tuple[str, int], list[float]]
"""The seconds of each piece of a step, every time that it ran. A piece is a kind of work ("teacher", "student", "loss",
"backward" ...) and its block."""


def now() -> float:
    """The seconds of a clock, read once all work that was given to a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Notes the seconds from one mark to the next, by a clock of its own (default: that of finished work on this machine)."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.clock = clock or now
        self.seconds: Seconds = {}
        self.last = self.clock()

    def mark(self, name: str, index: int) -> None:
        """Note the seconds since the last mark as those of a piece, which ends here."""
        self.seconds.setdefault((name, index), []).append(self.clock() - self.last)
        self.last = self.clock()


def trial_optimizer(parameters: Mapping[str, nn.Parameter], make: OptimizerFactory) -> torch.optim.Optimizer | None:
    """Make an optimizer over copies of parameters, with gradients of zero: its steps change no model. None without any."""
    copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    for copy in copies.values():
        copy.grad = torch.zeros_like(copy)
    return make(copies) if copies else None


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of an optimizer's state, once it has taken a step."""
    return num_bytes([list(state.values()) for state in optimizer.state.values()])


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
                self._known[memory_of(leaf)] = weakref.ref(storage, partial(self._forget, memory_of(leaf), storage.nbytes()))
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
