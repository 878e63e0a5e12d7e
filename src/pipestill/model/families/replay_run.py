"""One replay of a model's own forward for some consecutive blocks: what is skipped, what is live, and where it stops.

stage of blocks 2 and 3:   embed   [ 0   1   2   3 ]   norm   head
                           ------- skipped                          placeholders, of which nothing comes
                                     ^ what travelled takes the place of this layer's arguments
                                     ------  live                   the model's own layers
                                             ^ stops here: what this layer would get travels on
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pipestill.errors import ModelError
from pipestill.model.families.replay_layers import Layout
from pipestill.model.families.replay_standins import Outlines, hole


@dataclass(frozen=True)
class Crossing:
    """What travels after one block: some leaves of the next layer's arguments, or of the last layer's output."""

    leaves: tuple[int, ...]
    """The places of the tensors that travel among these leaves, that of the hidden states first."""
    spec: Any
    """For an output, its structure; None for arguments, whose structure the forward makes again."""
    rest: tuple[Any, ...]
    """For an output, all of its leaves, with None for those that travel."""
    inputs: frozenset[str]
    """The inputs that some later block reads; of others only the shape travels."""


@dataclass(frozen=True)
class Facts:
    """What holds for inputs of the same names."""

    crossings: tuple[Crossing, ...]
    """By block, of all but the last."""
    floats: Mapping[str, torch.dtype]
    """The types of the inputs that are tensors of floating-point numbers."""
    outputs: tuple[str, ...] | None
    """The entries of the model's output that its last block gives; None where it is no mapping."""

    def inputs_after(self, crossing: Crossing, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What travels of the inputs: only the shape of a tensor of floating-point numbers that no later block reads."""

        def shape_only(name: str, value: Any) -> bool:
            return isinstance(value, Tensor) and name in self.floats and name not in crossing.inputs

        return {name: tuple(value.shape) if shape_only(name, value) else value for name, value in inputs.items()}

    def filled(self, inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """The inputs of a call, with placeholders for those of which the shape travelled."""
        return {
            name: hole(value, self.floats[name], device) if isinstance(value, tuple) and name in self.floats else value
            for name, value in inputs.items()
        }

    def outputs_of(self, output: Any) -> Any:
        """What the last block gives of the model's output."""
        return output if self.outputs is None else {name: output[name] for name in self.outputs}


@dataclass(frozen=True)
class Outline:
    """What a skipped layer gives: for each leaf the argument that it is like, or a shape; or the leaf itself."""

    spec: Any
    leaves: tuple[Any, ...]


@dataclass(frozen=True)
class Like:
    """A tensor of a layer's output that has the shape and type of one of its arguments."""

    leaf: int


@dataclass(frozen=True)
class Shaped:
    """A tensor of a layer's output that is like none of its arguments."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Arrived:
    """What a stage's first block starts from."""

    tensors: tuple[Tensor, ...]
    """In the order of `Crossing.leaves`; none for the first block of a model."""
    crossing: Crossing | None


class Observer:
    """What is told of a replay as it goes; this one does nothing."""

    def entered(self, block: int) -> None:
        """Take note that what follows belongs to a block."""

    def called(self, layer: int, leaves: list[Any]) -> None:
        """Take note of a live layer's arguments."""

    def returned(self, layer: int, given: list[Any], leaves: list[Any], spec: Any) -> None:
        """Take note of what a live layer gave for the leaves of its arguments, `given`."""

    def called_beside(self, output: Any) -> None:
        """Take note of what a live module with weights beside the layers gave."""

    def skipped(self, tensors: list[Tensor]) -> None:
        """Take note of placeholders."""


@dataclass(eq=False)
class Stop(BaseException):
    """Ends a replay where the next stage goes on. No `Exception`, so that no forward catches it.

    It is not frozen, as a context manager that it passes, such as one of peft, sets its traceback.
    """

    leaves: list[Any]
    spec: Any


class OutOfOrder(Exception):
    """A layer was called twice, or before another one that comes first."""


@dataclass
class Run:
    """One replay. `before(block)` is called as each live block begins."""

    layout: Layout
    owners: dict[int, frozenset[int]]
    """By a module's id: the blocks that its parameters belong to."""
    outlines: tuple[Outline, ...]
    """By layer; none while the model is looked at for the first time, when all is live."""
    blocks: range
    arrived: Arrived
    before: Callable[[int], None]
    graph: bool
    """Whether live blocks make a graph."""
    observer: Observer = field(default_factory=Observer)
    next_layer: int = 0
    handed_on: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)
    """By the id of a placeholder: the placeholder, and what arrived for it. The forward hands it on to later layers too."""

    def start(self) -> None:
        """Begin: what comes before the first layer is live in the first block only."""
        if self.blocks.start == 0:
            self._enter(0)

    def _enter(self, block: int) -> None:
        """Begin with a live block."""
        if block == self.blocks.start:
            torch.set_grad_enabled(self.graph)
        self.observer.entered(block)
        self.before(block)

    def at_layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Skip a layer, run it or stop at it."""
        if number != self.next_layer:
            raise OutOfOrder(
                f"calls '{self.layout.layers[number]}' "
                + ("again" if number < self.next_layer else f"before '{self.layout.layers[self.next_layer]}'")
            )
        self.next_layer += 1
        block, first = self.layout.block_of_layer[number], self.blocks.start
        ends = number in self.layout.last_of_list
        if block < first:
            return self._output_of_skipped(number, ends and block + 1 == first, args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if block == first and self.arrived.crossing is not None:
            for place, tensor in zip(self.arrived.crossing.leaves, self.arrived.tensors, strict=True):
                self.handed_on[id(leaves[place])] = (leaves[place], tensor)
                leaves[place] = tensor
        if self.handed_on:
            leaves = [self.handed_on[id(leaf)][1] if id(leaf) in self.handed_on else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(leaves, spec)
        if block >= self.blocks.stop:
            raise Stop(leaves, spec)
        self._enter(block)
        self.observer.called(number, leaves)
        output = layer(*args, **kwargs)
        if type(self.observer) is not Observer or (ends and block + 1 >= self.blocks.stop):
            given, spec = pytree.tree_flatten(output)
            self.observer.returned(number, leaves, given, spec)
            if ends and block + 1 >= self.blocks.stop:
                raise Stop(given, spec)
        if ends:
            self._enter(block + 1)
        return output

    def _output_of_skipped(self, number: int, arrives: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What travelled, where that is this layer's output; else placeholders."""
        crossing = self.arrived.crossing
        if arrives:
            assert crossing is not None
            leaves = list(crossing.rest)
            for place, tensor in zip(crossing.leaves, self.arrived.tensors, strict=True):
                leaves[place] = tensor
            self._enter(self.blocks.start)
            return pytree.tree_unflatten(leaves, crossing.spec)
        given = pytree.tree_leaves((args, kwargs))
        device = self.arrived.tensors[0].device
        filled: list[Any] = []
        for leaf in self.outlines[number].leaves:
            if isinstance(leaf, Like) and isinstance(given[leaf.leaf], Tensor):
                filled.append(hole(tuple(given[leaf.leaf].shape), given[leaf.leaf].dtype, device))
            else:
                filled.append(hole(leaf.shape, leaf.dtype, device) if isinstance(leaf, Shaped) else leaf)
        self.observer.skipped([leaf for leaf in filled if isinstance(leaf, Tensor)])
        return pytree.tree_unflatten(filled, self.outlines[number].spec)

    def at_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outlines: Outlines) -> Any:
        """Call a module beside the layers where one of the blocks has parameters of it; else give placeholders."""
        owners = self.owners.get(id(module))
        if not self.outlines or not owners or any(block in self.blocks for block in owners):
            output = module(*args, **kwargs)
            self.observer.called_beside(output)
            return output
        given = outlines.fill(module, args, kwargs, self.arrived.tensors[0].device)
        self.observer.skipped([leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)])
        return given


def travelling(where: str, leaves: list[Any], crossing: Crossing) -> list[Tensor]:
    """The tensors that travel among the leaves at which a replay stopped; `ModelError` where there is something else."""
    tensors = [leaves[place] for place in crossing.leaves if place < len(leaves) and isinstance(leaves[place], Tensor)]
    if len(tensors) < len(crossing.leaves):
        raise ModelError(
            f"after {where}, the model's forward passes on other values than it did on the sample; pass cuts of your own"
        )
    return tensors
