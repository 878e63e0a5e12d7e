"""Tensors that gradients reach and no optimizer knows are refused before training."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import Call, distilled, linears
from support.models import CLASSES, vectors
from torch import Tensor, nn

import pipestill as ps
from pipestill.errors import ModelError
from pipestill.model.dry_run import dry_run

X, Y = vectors((6,))[0]


def matched(projector: nn.Module) -> Callable[..., Tensor]:
    return lambda student, teacher, target: F.mse_loss(projector(student), teacher)


def task(loss: Any, *blocks: nn.Module) -> ps.Distillation:
    student = nn.Sequential(*(blocks or linears(4, 8, CLASSES)))
    return ps.Distillation(nn.Sequential(*linears(4, 8, CLASSES)), student, loss)


class Holds:
    """A plain object with a projector."""

    def __init__(self) -> None:
        self.projector = nn.Linear(CLASSES, CLASSES)

    def __call__(self, student: Tensor, teacher: Tensor, target: Any) -> Tensor:
        return F.mse_loss(self.projector(student), teacher)


@pytest.mark.parametrize("make", [lambda: matched(nn.Linear(CLASSES, CLASSES)), Holds])
def test_projector_that_a_loss_captures_is_not_left_untrained_in_silence(make: Callable[[], Any]) -> None:
    with pytest.raises(ModelError, match=rf"the loss trains tensors of shape .*\({CLASSES}, {CLASSES}\).* make the"):
        ps.Trainer(task(make()), strategy="reference", device="cpu").fit([(X, Y)])
    dry_run(task(matched(nn.Linear(CLASSES, CLASSES).requires_grad_(False))), X, Y)


def test_parameter_that_a_block_captures_is_not_left_untrained_in_silence() -> None:
    scale = torch.ones(8, requires_grad=True)
    blocks = [nn.Linear(4, 8), Call(lambda self, x: x * scale), nn.Linear(8, CLASSES)]
    with pytest.raises(ModelError, match=r"the student's blocks train a tensor of shape \(8,\), of no module of the student"):
        dry_run(task(ps.losses.LogitsMSE(), *blocks), X, Y)


def test_losses_of_the_models_own_weights_and_fresh_leaves_are_allowed() -> None:
    made = distilled(*linears(4, 8, CLASSES))

    def loss(student: Tensor, teacher: Tensor, target: Any) -> Tensor:
        fresh = torch.zeros(CLASSES, requires_grad=True)
        head = made.teacher[3]
        return F.mse_loss(student + fresh, teacher) + 1e-3 * made.student[1].weight.square().sum() + head.bias.sum() * 0

    dry_run(ps.Distillation(made.teacher, made.student, loss), X, Y)
