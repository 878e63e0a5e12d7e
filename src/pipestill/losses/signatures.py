"""What losses and metrics take and return."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

LossValue = Tensor | Mapping[str, Tensor]
"""The mean loss of some rows: a scalar, or a dict of named scalars whose sum is the loss."""
Counts = float | Tensor | Mapping[str, float | Tensor]
"""How much a target counts for: a number for a loss that is a scalar, or a dict of numbers by part (see `ps.losses.counted`)."""
DistillationLoss = Callable[[Any, Any, Any], LossValue]
"""From (student output, teacher output, target)."""
MomentumLoss = Callable[[Sequence[Any], Sequence[Any], Any], LossValue]
"""From (student outputs, teacher outputs, target), with one output a view."""
SupervisedLoss = Callable[[Any, Any], LossValue]
"""From (output, target)."""
BlockLoss = Callable[[Any, Any], Tensor]
"""From (output of a student block, output of its teacher block) to a scalar."""
Metric = Callable[[Any, Any], LossValue]
"""From (output, target) to the mean over rows, a scalar or a loss of one part; see `pipestill.losses.metrics`."""


def takes_target(loss: Callable[..., Any]) -> bool:
    """Whether a loss of two values inside the models takes the target too: as a third argument that has no default."""
    try:
        parameters = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters.values()
    except (TypeError, ValueError):  # a builtin, which tells nothing
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) > 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def check_shapes(student: Tensor, teacher: Tensor) -> None:
    """Refuse outputs of two shapes, which a loss would broadcast to a number that means nothing."""
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
