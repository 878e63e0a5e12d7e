"""The kinds of training, as values: which models take part and what the loss is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from pipestill.errors import ModelError
from pipestill.losses import DistillationLoss, LossValue, SupervisedLoss
from pipestill.model.blocks import Block, BlockModel


@dataclass(frozen=True)
class Distillation:
    """A frozen teacher and a student trained end to end.

    `loss(student_output, teacher_output, target)` is the mean over the rows it gets, a scalar or a dict of scalars
    that add up to it. The teacher runs in eval mode, without gradients, and is never changed. Cuts: see `BlockModel`.
    """

    teacher: nn.Module
    student: nn.Module
    loss: DistillationLoss
    teacher_cuts: Sequence[str | Block] | None = None
    student_cuts: Sequence[str | Block] | None = None

    def __post_init__(self) -> None:
        _check_loss(self.loss)
        if self.teacher is self.student:
            raise ModelError("teacher and student are the same module; expected two")
        shared = set(_parts_of(self.teacher)) & set(_parts_of(self.student))
        if shared:
            names = [name for part, name in _parts_of(self.student).items() if part in shared]
            raise ModelError(
                f"teacher and student share {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}; "
                "a frozen teacher needs modules, parameters and buffers of its own (copy.deepcopy)"
            )

    @cached_property
    def student_blocks(self) -> BlockModel:
        return BlockModel(self.student, self.student_cuts)

    @cached_property
    def teacher_blocks(self) -> BlockModel | None:
        return BlockModel(self.teacher, self.teacher_cuts)

    def loss_parts(self, student: Any, teacher: Any, target: Any) -> dict[str, Tensor]:
        """The loss as named parts that add up to it."""
        return _parts(self.loss(student, teacher, target))


@dataclass(frozen=True)
class Supervised:
    """A student alone, trained on labels: the baseline that distillation is compared with.

    `loss(output, target)` is the mean over the rows it gets, a scalar or a dict of scalars that add up to it.
    """

    student: nn.Module
    loss: SupervisedLoss
    student_cuts: Sequence[str | Block] | None = None

    def __post_init__(self) -> None:
        _check_loss(self.loss)

    @cached_property
    def student_blocks(self) -> BlockModel:
        return BlockModel(self.student, self.student_cuts)

    @property
    def teacher_blocks(self) -> BlockModel | None:
        return None

    def loss_parts(self, student: Any, teacher: Any, target: Any) -> dict[str, Tensor]:
        """The loss as named parts that add up to it; `teacher` is None."""
        return _parts(self.loss(student, target))


Task = Distillation | Supervised


def _check_loss(loss: object) -> None:
    """A loss may hold buffers, but nothing to train: no optimizer would see it."""
    trained = [n for n, p in loss.named_parameters() if p.requires_grad] if isinstance(loss, nn.Module) else []
    if trained:
        raise ModelError(
            f"the loss has parameters to train ({', '.join(trained[:5])}{' and more' if len(trained) > 5 else ''}), "
            "but only the student is trained; make them part of the student, or freeze them (requires_grad_(False))"
        )


def _parts_of(model: nn.Module) -> dict[int, str]:
    """The identity and name of everything that a model consists of."""
    named = (*model.named_modules(), *model.named_parameters(), *model.named_buffers())
    return {id(part): f"'{name}'" for name, part in named}


def _parts(value: LossValue) -> dict[str, Tensor]:
    parts = dict(value) if isinstance(value, Mapping) else {"loss": value}
    if not parts:
        raise ModelError("the loss gave no part; expected a scalar, or a dict of scalars that add up")
    for name, part in parts.items():
        if not isinstance(part, Tensor) or part.dim():
            shape = f"a tensor of shape {tuple(part.shape)}" if isinstance(part, Tensor) else repr(part)
            raise ModelError(f"the loss gave {shape} as '{name}'; expected a scalar, or a dict of scalars that add up")
    return parts
