"""A block: an indivisible slice of a model, the atom that partitions into stages are made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class JointCall(Protocol):
    """A block's call that can run blocks behind it at once: cheaper, and with the same result, as one by one."""

    def joins(self, other: Any) -> bool:
        """Whether `other` is the call of the block right behind this one."""
        ...

    def run_with(self, following: Sequence[Any], value: Any, before: Callable[[int], None]) -> Any:
        """The value after this block and those of the calls in `following`.

        `before(i)` is called just before the i-th of them does anything that random numbers matter for, 0 for this one.
        """
        ...


@dataclass(frozen=True)
class Block:
    """An indivisible slice of a model, for a cut that is no submodule.

    Args:
        name: the block's name in messages, pictures and profiles, such as "stem".
        call: the function that maps the value before the block to the value after it. A value is a tensor, or any nest of
            tuples, lists and dicts over tensors; the first block takes a batch's inputs as the loader gives them.
        uses: names of the submodules and parameters of the model that `call` reads, as in `model.named_modules()` and
            `model.named_parameters()`; "" names the whole model. They move between devices and are trained with the block.
    """

    name: str
    call: Callable[[Any], Any]
    uses: tuple[str, ...]
