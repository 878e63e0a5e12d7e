"""Finds tensors that a task's losses or blocks would train and no optimizer knows: a projector that a lambda captures."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from pipestill.errors import ModelError
from pipestill.model.blocks import BlockModel
from pipestill.model.boundary import leaves_of
from pipestill.model.nests import copied
from pipestill.model.stepwise import modules_of
from pipestill.model.tasks import Task, view


def check_strays(task: Task, inputs: Any, targets: Any) -> None:
    """Refuse a loss or a block through which gradients reach tensors that are no parameter of the task's modules.

    The graph of the loss is walked twice, on a few rows: what is not the same tensor both times was made in between, and
    nothing is expected of it. Call it inside `untouched`.
    """
    known = {id(p) for module in modules_of(task) for p in module.parameters()}
    first = _strays(task, inputs, targets, known)
    if not any(first):
        return
    again = _strays(task, inputs, targets, known)
    of_loss, of_blocks = (
        {key: tensor for key, tensor in one.items() if key in two} for one, two in zip(first, again, strict=True)
    )
    if of_blocks:
        raise ModelError(
            f"the student's blocks train {_shapes(of_blocks)}, of no module of the student, so no optimizer would update them "
            "and their gradients would grow; make them parameters of the student, or freeze them (requires_grad_(False))"
        )
    if of_loss:
        raise ModelError(
            f"the loss trains {_shapes(of_loss)}, of no module that is trained, so no optimizer would update them and their "
            "gradients would grow; make the loss an nn.Module that has them as its parameters (self.projector = projector), or "
            "freeze them (requires_grad_(False))"
        )


def _strays(task: Task, inputs: Any, targets: Any, known: set[int]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The leaves of autograd that only the loss reaches, and those that the student's outputs do, but for those in `known`."""
    demands, features = task.demands, task.feature_losses
    taught: list[list[Any]] = []
    taken: dict[int, Tensor] = {}
    if task.teacher_blocks is not None:
        with torch.no_grad():
            taught = [_values(task.teacher_blocks, view(task, inputs, v)) for v in range(demands.teacher_views)]
            for i, value in enumerate(taught[0]):
                taken |= features.taken(i, value, copied=True)
    with torch.enable_grad():
        values = [_values(task.student_blocks, view(task, inputs, v)) for v in range(demands.views)]
        outputs = [of_view[-1] for of_view in values]
        parts = [*task.loss_parts(outputs, [of_view[-1] for of_view in taught], targets).values()]
        for block in features.student_blocks:
            parts += features.parts(block, [values[0][block]], [taken], targets).values()
    of_blocks = _leaves(pytree.tree_leaves(values), known)
    of_loss = {key: leaf for key, leaf in _leaves(parts, known).items() if key not in of_blocks}
    return of_loss, of_blocks


def _values(model: BlockModel, inputs: Any) -> list[Any]:
    """The value after each block, as one graph."""
    values = [copied(inputs)]
    for block in model.blocks:
        values.append(block.call(values[-1]))
    return values[1:]


def _leaves(values: Iterable[Any], known: set[int]) -> dict[int, Tensor]:
    """The leaves of autograd behind some tensors, by id, but for those in `known`."""
    roots: list[Node] = [value.grad_fn for value in values if isinstance(value, Tensor) and value.grad_fn is not None]
    return {id(leaf): leaf for root in roots for leaf in leaves_of(root) if id(leaf) not in known}


def _shapes(tensors: Mapping[int, Tensor]) -> str:
    """The shapes of some tensors, for a message."""
    shapes = [str(tuple(tensor.shape)) for tensor in tensors.values()]
    more = f" and {len(shapes) - 5} more" if len(shapes) > 5 else ""
    return f"{'a tensor' if len(shapes) == 1 else 'tensors'} of shape {', '.join(shapes[:5])}{more}"
