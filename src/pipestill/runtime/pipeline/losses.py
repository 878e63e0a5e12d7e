"""The loss of a microbatch or a batch: of the outputs of its units, weighted, and checked to be finite."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pipestill.losses.step import step_number
from pipestill.model.tasks import Task
from pipestill.runtime.reports import check_finite, why_not_finite


def weighted_loss(parts: dict[str, Tensor], factors: Sequence[float]) -> Tensor:
    """The part of a batch's loss that a microbatch contributes, by the factor of each part (see `Batch.factors`)."""
    weighted = [part * factor for part, factor in zip(parts.values(), factors, strict=True)]
    return torch.stack(weighted).sum() if len(weighted) > 1 else weighted[0]


def backward(loss: Tensor) -> None:
    """Run a loss's backward, if it depends on anything that is trained: where features are compared, outputs need not count."""
    if loss.requires_grad:
        loss.backward()


def evaluate_loss(task: Task, student: Mapping[int, Any], teacher: Mapping[int, Any], target: Any) -> dict[str, Tensor]:
    """The loss of the outputs of units, which are joined to one output a view."""
    demands = task.demands
    outputs = [_joined(student, demands.views, v) for v in range(demands.views)]
    views = range(demands.teacher_views if teacher else 0)
    taught = [_joined(teacher, demands.teacher_views, v) for v in views]
    parts = task.loss_parts(outputs, taught, target)
    if all(part.device.type == "cpu" for part in parts.values()):  # elsewhere, a look at them would wait for the device
        losses = {name: float(part.detach()) for name, part in parts.items()}
        check_finite(losses, step_number(), lambda: why_not_finite(outputs, taught, target))
    return parts


def _joined(outputs: Mapping[int, Any], views: int, view: int) -> Any:
    parts = [outputs[unit] for unit in sorted(outputs) if unit % views == view]
    return parts[0] if len(parts) == 1 else pytree.tree_map(lambda *tensors: torch.cat(tensors), *parts)
