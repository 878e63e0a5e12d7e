"""Seeds random numbers by what they are drawn for, so that they do not depend on which rank draws them, or when."""

from collections.abc import Callable
from hashlib import blake2b
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipestill.schedule import Role

T = TypeVar("T")


def seed_block(seed: int, role: Role, block: int, step: int, unit: int, device: torch.device) -> None:
    """Seed the device's default generator for one forward of one block, so that it draws the same on any schedule.

    `unit` tells the forwards of a block within a step apart: microbatches, and views of them.
    """
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[_index(device)]
    generator.manual_seed(derive(seed, role.value, block, step, unit))


def derive(*parts: object) -> int:
    """Hash values that `repr` writes fully, such as numbers and text, to a seed of 63 bits."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def seeded(seed: int, build: Callable[[], T]) -> T:
    """Call `build` with the CPU's random numbers drawn from `seed`, and leave the random state as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _index(device: torch.device) -> int:
    """The number of a GPU; the current one where the device names none."""
    return torch.cuda.current_device() if device.index is None else device.index


class OwnGenerator(TorchDispatchMode):
    """A mode of one thread in which random operators that are given no generator draw from `generator`.

    A loader that shuffles or augments in a background thread then does not disturb the models' random numbers, is not
    disturbed by them, and yields the same data on every run.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run one operator, with this mode's generator where it draws on the CPU and was given none."""
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            own = self._with_generator(func)
            if own is not None and not any(isinstance(a, Tensor) and a.device.type != "cpu" for a in args):
                return own(*args, **{**kwargs, "generator": self.generator})
        return func(*args, **kwargs)

    @staticmethod
    def _with_generator(func: Any) -> Any:
        """The overload of an operator that takes a generator beside the same arguments; None where there is none."""
        names = [a.name for a in func._schema.arguments]
        if "generator" in names:
            return func
        for overload in func.overloadpacket.overloads():
            other = getattr(func.overloadpacket, overload)
            if [a.name for a in other._schema.arguments if a.name != "generator"] == names and "generator" in [
                a.name for a in other._schema.arguments
            ]:
                return other
        return None
