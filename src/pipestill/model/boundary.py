"""Where the graph of a model is divided: a value leaves one graph and is the start of the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pipestill.model.nests import distinct_tensors


class _Enter(torch.autograd.Function):
    """Starts a graph at given values, and hands out the gradients that reach it as they are.

    Leaves of autograd would do for most models, but refuse to be written to in place and keep their gradients in
    their own order of memory instead of in the one that they came in.
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


def enter(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Where a graph is cut: the same tensors as the start of a new one, and a list that its backward fills.

    After the backward, the list holds the gradient of each tensor, or None for one that was not used.
    """
    gradients: list[Tensor | None] = [None] * len(tensors)
    if not tensors:
        return [], gradients
    start = torch.zeros((), requires_grad=True)
    entered = _Enter.apply(start, gradients, *(tensor.detach() for tensor in tensors))  # type: ignore[no-untyped-call]
    return list(entered), gradients


def detached(value: Any) -> tuple[Any, list[Tensor], list[Tensor | None]]:
    """The same nest (aliases kept) as the start of a new graph; its tensors that carry the old one; their gradients.

    The backward of the new graph fills the last list (see `enter`).
    """
    tracked = [tensor for tensor in distinct_tensors(value) if tensor.requires_grad]
    entered, gradients = enter(tracked)
    fresh = {id(old): new for old, new in zip(tracked, entered, strict=True)}
    return pytree.tree_map_only(Tensor, lambda t: fresh.get(id(t), t), value), tracked, gradients
