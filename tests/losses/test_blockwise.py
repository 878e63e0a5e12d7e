"""Losses of blocks' outputs against the formulas that they come from."""

import math
from collections.abc import Callable

import pytest
import torch
from support.outputs import STUDENT, TEACHER, softmax
from torch import Tensor

from pipestill.losses import SoftCrossEntropy, cosine_distance, mse, normalised_mse

ROWS = [(s, t) for s, t in zip(STUDENT, TEACHER, strict=True)]


def test_by_hand() -> None:
    """Images of one row each: all axes but the first belong to a row."""
    student, teacher = STUDENT.view(2, 3, 1, 1), TEACHER.view(2, 3, 1, 1)
    squares = [float((s - t).square().sum()) for s, t in ROWS]
    assert mse(student, teacher).item() == pytest.approx(sum(squares) / 6)
    relative = [square / float(t.square().sum()) for square, (_, t) in zip(squares, ROWS, strict=True)]
    assert normalised_mse(student, teacher).item() == pytest.approx(sum(relative) / 2)
    distances = [1 - float(s @ t) / float(s.norm() * t.norm()) for s, t in ROWS]
    assert cosine_distance(student, teacher).item() == pytest.approx(sum(distances) / 2, rel=1e-5)


def test_normalised_error_of_a_teacher_row_of_zeros_is_not_infinite() -> None:
    """It is 0 / 0 where the student agrees, and the square of the student over 0 where not. Other rows stay what they are."""
    zeros = torch.zeros(2, 3)
    assert normalised_mse(zeros, zeros).item() == 0.0
    for scale in (1.0, 1e-20):
        assert normalised_mse(STUDENT, zeros * scale).item() == pytest.approx(mse(STUDENT, zeros).item())
    student, teacher = torch.cat([STUDENT, STUDENT]).requires_grad_(), torch.cat([TEACHER, zeros])
    loss = normalised_mse(student, teacher)
    assert loss.item() == pytest.approx((normalised_mse(STUDENT, TEACHER).item() + mse(STUDENT, zeros).item()) / 2)
    loss.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_soft_cross_entropy_by_hand() -> None:
    entropies = [-sum(a * math.log(b) for a, b in zip(softmax(t, 2.0), softmax(s, 2.0), strict=True)) for s, t in ROWS]
    assert SoftCrossEntropy(2.0)(STUDENT, TEACHER).item() == pytest.approx(4 * sum(entropies) / 2, rel=1e-5)


@pytest.mark.parametrize("loss", [mse, normalised_mse, cosine_distance, SoftCrossEntropy()])
def test_nothing_is_broadcast(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"student \(2, 3\) and teacher \(1, 3\) differ in shape"):
        loss(STUDENT, TEACHER[:1])
