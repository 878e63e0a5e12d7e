"""Finds a model's layers: the lists of modules that its forward calls one after the other, each once.

    forward:   embed   [ 0   1   2 ]   norm   embed   [ 0   1   2 ]   norm   head
    blocks:    -- 0 --   1   2   3   --- 4 ---------    5   6   7   --- 8 ------

A list's member takes hidden states and gives hidden states of the same shape. What the forward does before the first list,
between two lists and after the last one are blocks of their own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pipestill.errors import ModelError

_FEWEST_TENSORS = 3
"""A layer has at least so many parameters: two linear maps and a norm. Single convolutions and heads have fewer."""


@dataclass(frozen=True)
class Layout:
    """The layers of a model in the order in which its forward calls them, and the blocks that are made of them."""

    lists: tuple[tuple[str, ...], ...]
    """The names of the layers, list by list."""

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The names of all layers."""
        return tuple(name for names in self.lists for name in names)

    @cached_property
    def last_of_list(self) -> frozenset[int]:
        """The numbers of those layers that end a list."""
        ends = [sum(map(len, self.lists[: i + 1])) - 1 for i in range(len(self.lists))]
        return frozenset(ends)

    @cached_property
    def block_of_layer(self) -> tuple[int, ...]:
        """The number of each layer's block."""
        return tuple(
            1 + number + sum(end < number for end in self.last_of_list) for number in range(len(self.layers))
        )  # fmt: skip

    @cached_property
    def layer_of_block(self) -> dict[int, int]:
        """The layer of each block that is one."""
        return {block: layer for layer, block in enumerate(self.block_of_layer)}

    @cached_property
    def block_names(self) -> tuple[str, ...]:
        """The name of each block, in order."""
        names = ["embeddings", *self.lists[0]]
        for layers in self.lists[1:]:
            names += [f"before.{layers[0].rpartition('.')[0]}", *layers]
        return (*names, "head")

    def is_layer(self, name: str) -> bool:
        """Whether a submodule is a layer or lies inside one."""
        return any(name == layer or name.startswith(f"{layer}.") for layer in self.layers)

    def holds_layer(self, name: str) -> bool:
        """Whether layers lie inside a submodule."""
        return any(not name or layer.startswith(f"{name}.") for layer in self.layers)


@dataclass
class _Calls:
    """What one candidate list's members were seen to do in one forward."""

    names: list[str]
    order: list[int] = field(default_factory=list)
    """The number of each member that was called, in order."""
    moments: list[int] = field(default_factory=list)
    """When the calls began and ended, counted in calls of all candidates."""
    keeps_shape: bool = True
    """Whether every call gave a tensor of the shape of the first one that it took."""

    @property
    def is_chain(self) -> bool:
        """Whether every member was called once, one after the other."""
        return self.order == list(range(len(self.names))) and self.keeps_shape and self.moments == sorted(self.moments)


def find_layers(model: nn.Module, forward: Callable[[], Any]) -> Layout:
    """Find the layers that `forward()`, a call of the model, runs; `ModelError` where there is no list of layers."""
    found = {name: _Calls(members) for name, members in _candidates(model)}
    clock = iter(range(10**9))
    hooks = []
    for calls in found.values():
        for number, member in enumerate(calls.names):
            hooks += _watch(model.get_submodule(member), calls, number, clock)
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    chosen: dict[str, _Calls] = {}
    for name, calls in found.items():  # outer lists come before those inside their members
        if calls.is_chain and not any(name.startswith(f"{other}.") for other in chosen):
            chosen[name] = calls
    in_time = sorted(chosen.values(), key=lambda calls: calls.moments[0])
    for one, other in pairwise(in_time):
        if one.moments[-1] > other.moments[0]:
            raise ModelError(
                f"{type(model).__name__} calls the layers of '{_list_of(one)}' and '{_list_of(other)}' in turns; "
                "pass cuts of your own"
            )
    if not in_time:
        why = [f"'{name}' is called {_times(calls)}" for name, calls in found.items() if calls.order and not calls.is_chain]
        raise ModelError(
            f"cannot tell the layers of {type(model).__name__}: no list of modules is called in its order, each member once, "
            f"with tensors of the same shape in and out{' (' + '; '.join(why[:3]) + ')' if why else ''}; pass cuts of your own"
        )
    return Layout(tuple(tuple(calls.names) for calls in in_time))


def _times(calls: _Calls) -> str:
    """How a list's members were called, for a message."""
    if not calls.keeps_shape:
        return "with other shapes in than out"
    return f"in the order {', '.join(map(str, calls.order[:8]))}{' ...' if len(calls.order) > 8 else ''}"


def _list_of(calls: _Calls) -> str:
    """The name of a list."""
    return calls.names[0].rpartition(".")[0]


def _candidates(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """The lists of a model that may be its layers, and the names of their members."""
    for name, module in model.named_modules():
        is_list = isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) and name
        if is_list and all(sum(1 for _ in member.parameters()) >= _FEWEST_TENSORS for member in module.children()):
            yield name, [f"{name}.{key}" for key in module._modules]


def _watch(member: nn.Module, calls: _Calls, number: int, clock: Iterator[int]) -> list[Any]:
    """Note in `calls` when a member is called, and what shapes come and go; returns the hooks."""
    shapes: list[Any] = []

    def came(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.order.append(number)
        calls.moments.append(next(clock))
        shapes.append(next(iter(_float_shapes((args, kwargs))), None))

    def went(module: nn.Module, args: Any, output: Any) -> None:
        calls.moments.append(next(clock))
        shape = shapes.pop()
        calls.keeps_shape &= shape is not None and shape in _float_shapes(output)

    return [member.register_forward_pre_hook(came, with_kwargs=True), member.register_forward_hook(went)]


def _float_shapes(nest: Any) -> list[Any]:
    """The shapes of the floating-point tensors of a nest."""
    return [t.shape for t in pytree.tree_leaves(nest) if isinstance(t, Tensor) and t.is_floating_point()]
