"""Tasks: the kinds of training as values."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipestill as ps
from pipestill.errors import ModelError


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4, affine=False))


def test_blocks_of_both_models() -> None:
    task = ps.Distillation(model(), model(), ps.losses.LogitsMSE(), teacher_cuts=["0", "1", "2"])
    assert task.teacher_blocks is not None
    assert [b.name for b in task.teacher_blocks.blocks] == [b.name for b in task.student_blocks.blocks] == ["0", "1", "2"]
    assert task.student_blocks is task.student_blocks
    assert task.student_blocks.model is task.student


def test_supervised_has_no_teacher() -> None:
    task = ps.Supervised(model(), ps.losses.cross_entropy)
    assert task.teacher_blocks is None
    output, target = torch.randn(3, 4), torch.tensor([1, 2, 3])
    assert task.loss_counts(target) == {"cross_entropy": 3.0}
    found = task.loss_parts([output], [], target)["cross_entropy"]
    assert found.item() == pytest.approx(F.cross_entropy(output, target, reduction="sum").item(), rel=1e-6)


def test_a_scalar_loss_is_one_part() -> None:
    def loss(student: Tensor, teacher: Tensor, target: Any) -> Tensor:
        return (student - teacher).sum() + target

    parts = ps.Distillation(model(), model(), loss).loss_parts([torch.ones(2)], [torch.zeros(2)], 3)
    assert {name: part.item() for name, part in parts.items()} == {"loss": 5.0}


@pytest.mark.parametrize("value", [torch.zeros(1), torch.zeros(2, 2), 0.5, None, {}, {"a": torch.zeros(()), "b": 1}])
def test_a_loss_gives_scalars(value: Any) -> None:
    with pytest.raises(ModelError, match="the loss gave .*expected a scalar, or a dict of scalars that add up"):
        ps.Supervised(model(), lambda output, target: value).loss_parts([torch.ones(2)], [], None)


def test_a_loss_that_shares_tensors_with_a_model_is_refused() -> None:
    """They would be trained in two places."""

    class Projected(nn.Module):
        def __init__(self, projection: nn.Module) -> None:
            super().__init__()
            self.projection = projection

    student = model()
    for make in (lambda loss: ps.Distillation(model(), student, loss), lambda loss: ps.Supervised(student, loss)):
        with pytest.raises(ModelError, match=r"loss has 'projection.weight' in common with the student; give each its own"):
            make(Projected(student[0]))
        make(Projected(nn.Linear(4, 4)))


def test_teacher_and_student_share_nothing() -> None:
    """Not even a stateless module: the one would put the other's dropout in its own mode."""
    teacher = model()
    with pytest.raises(ModelError, match="same module"):
        ps.Distillation(teacher, teacher, ps.losses.LogitsMSE())
    ps.Distillation(teacher, copy.deepcopy(teacher), ps.losses.LogitsMSE())
    for student, shared in (
        (nn.Sequential(teacher[0], nn.ReLU()), "'0', '0.weight', '0.bias'"),
        (nn.Sequential(nn.Linear(4, 4), teacher[1]), "'1'"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)), "'1.running_mean'"),
        (nn.Sequential(nn.Linear(4, 4)), "'0.bias'"),
    ):
        if shared == "'1.running_mean'":
            student[1].running_mean = teacher[2].running_mean
        if shared == "'0.bias'":
            student[0].bias = teacher[0].bias
        with pytest.raises(ModelError, match=f"teacher and student share {shared}; .*copy.deepcopy"):
            ps.Distillation(teacher, student, ps.losses.LogitsMSE())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ps.Distillation(teacher_model=model(), student=model(), loss=len), "'teacher_model'; it is called `teacher`"),
        (lambda: ps.Distillation(model(), student_model=model(), loss_fn=len), "'loss_fn'; it is called `loss` here"),
        (lambda: ps.Supervised(model=model(), loss=len), "Supervised has no argument 'model'; it is called `student` here"),
        (lambda: ps.Momentum(model(), model(), len, ema_decay=0.9), "'ema_decay'; it is called `momentum` here"),
        (lambda: ps.Blockwise(model(), model(), adapters={}), "'adapters'; it is called `output_projectors` here"),
        (lambda: ps.Blockwise(model(), model(), input_adapters={}), "it is called `input_projectors` here"),
        (lambda: ps.Blockwise(model(), model(), candidate={}), "did you mean 'candidates'?"),
    ],
)  # fmt: skip
def test_names_that_others_use_get_a_hint(make: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        make()
