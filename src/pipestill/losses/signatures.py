"""The forms that losses and metrics have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

LossValue = Tensor | Mapping[str, Tensor]
DistillationLoss = Callable[[Any, Any, Any], LossValue]
MomentumLoss = Callable[[Sequence[Any], Sequence[Any], Any], LossValue]
SupervisedLoss = Callable[[Any, Any], LossValue]
BlockLoss = Callable[[Any, Any], Tensor]
Metric = Callable[[Any, Any], Tensor]


def check_shapes(student: Tensor, teacher: Tensor) -> None:
    """Before anything is broadcast: a loss would then come out all the same."""
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
