"""Divides autograd's graph at a boundary between blocks: the value before it becomes the start of a new graph.

The new graph's backward leaves the gradients of that value in a list, from which they go on into the old graph, on this rank
or another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pipestill.model.nests import distinct_tensors


class _GraphStart(torch.autograd.Function):
    """A node that starts a graph at given tensors and hands out the gradients that reach it, unchanged.

    Autograd's own leaves would do for most models. But they refuse to be written to in place, and they keep gradients in
    their own memory format instead of the one in which the gradients came.
    """

    @staticmethod
    def forward(ctx: Any, start: Tensor, gradients: list[Tensor | None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.gradients[:] = gradients
        return (None, None, *(None for _ in gradients))


def start_graph(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Start a new graph at `tensors`. Returns the tensors in that graph, and a list that its backward fills.

    After the backward, the list holds the gradient of each tensor, or None for a tensor that was not used.
    """
    gradients: list[Tensor | None] = [None] * len(tensors)
    if not tensors:
        return [], gradients
    start = torch.zeros((), requires_grad=True)
    entered = _GraphStart.apply(start, gradients, *(tensor.detach() for tensor in tensors))  # type: ignore[no-untyped-call]
    return list(entered), gradients


class Detached(NamedTuple):
    """A nest as the start of a new graph, and what joins it to the old one."""

    value: Any
    """The same nest, over tensors of the new graph."""
    tracked: list[Tensor]
    """The distinct tensors of the old nest that carry the old graph."""
    gradients: list[Tensor | None]
    """The gradient of each of `tracked`, once the new graph's backward has run; None before, or where it is not used."""


def detached(value: Any) -> Detached:
    """Start a new graph at a nest, at those of its tensors that carry a graph."""
    tracked = [tensor for tensor in distinct_tensors(value) if tensor.requires_grad]
    entered, gradients = start_graph(tracked)
    fresh = {id(old): new for old, new in zip(tracked, entered, strict=True)}
    return Detached(pytree.tree_map_only(Tensor, lambda t: fresh.get(id(t), t), value), tracked, gradients)


def start_of(value: Any) -> Tensor | None:
    """Find the leaf of autograd at which the graph of a nest begins; None where the nest carries no graph.

    The nest comes from `start_graph` or `detached`, and nothing may have written to it in place yet.
    """
    entered = [tensor for tensor in distinct_tensors(value) if tensor.requires_grad]
    if not entered:
        return None
    node = entered[0].grad_fn
    assert node is not None and node.next_functions[0][0] is not None
    start: Tensor = node.next_functions[0][0].variable  # type: ignore[attr-defined]
    return start
