"""Divergences against their definitions in float64, for models that agree, almost agree, differ and forbid words."""

from __future__ import annotations

import pytest
import torch
from support.divergences import by_definition
from torch import Tensor

import pipestill as ps
from pipestill.losses import LogitLoss

INF = float("inf")


def losses(temperature: float) -> list[LogitLoss]:
    kinds = (ps.losses.ForwardKL, ps.losses.ReverseKL, ps.losses.TotalVariation)
    mixed = [ps.losses.JSD(beta, temperature) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)]
    return [*(kind(temperature) for kind in kinds), *mixed, ps.losses.TopKKL(3, temperature), ps.losses.LogitsMSE()]


def logits(distance: float, dtype: torch.dtype, words: int = 300) -> tuple[Tensor, Tensor]:
    """Two models' logits of 12 tokens; the teacher's are off by a normal distance."""
    generator = torch.Generator().manual_seed(words)
    student = (3 * torch.randn(12, words, generator=generator)).to(dtype)
    return student, (student.double() + distance * torch.randn(12, words, generator=generator).double()).to(dtype)


def value_and_gradient(loss: LogitLoss, student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
    given = student.clone().requires_grad_()
    value = loss(given, teacher, None)[loss.part]
    value.backward()
    assert given.grad is not None and given.grad.dtype == student.dtype
    return value.item(), given.grad


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("distance", [20.0, 1.0, 3e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_the_definition_in_float64(dtype: torch.dtype, distance: float, temperature: float) -> None:
    student, teacher = logits(distance, dtype)
    for loss in losses(temperature):
        value, gradient = value_and_gradient(loss, student, teacher)
        exact = student.double().clone().requires_grad_()
        expected = by_definition(loss, exact, teacher).mean()
        expected.backward()
        assert value == pytest.approx(expected.item(), rel=1e-6), loss
        assert exact.grad is not None
        error = float((gradient.double() - exact.grad).norm() / exact.grad.norm())
        assert error < (1e-6 if dtype != torch.bfloat16 else 4e-3), loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_divergence_of_models_that_almost_agree_is_not_negative(dtype: torch.dtype) -> None:
    """bfloat16 logits once gave a negative divergence, as did float32 ones at T = 4."""
    for distance in (0.0, 1e-6, 1e-4):
        student, teacher = logits(distance, dtype, 2000)
        for loss in losses(4.0):
            of_tokens = [loss(student[i : i + 1], teacher[i : i + 1], None)[loss.part].item() for i in range(4)]
            assert min(of_tokens) >= 0.0
            if torch.equal(student, teacher):
                assert max(of_tokens) == 0.0


@pytest.mark.parametrize("distance", [1e-4, 1e-6])
def test_very_close_models_keep_their_distance(distance: float) -> None:
    """Where even the definition in float64 loses its digits: the divergence is half the variance of the logits' distances."""
    student, teacher = logits(distance, torch.float64)
    probabilities = (student / 4).softmax(-1)
    gap = (teacher - student) / 4
    variance = (probabilities * gap.square()).sum(-1) - (probabilities * gap).sum(-1).square()
    for loss in (ps.losses.ForwardKL(4.0), ps.losses.ReverseKL(4.0)):
        assert loss(student, teacher, None)[loss.part].item() == pytest.approx(8 * variance.mean().item(), rel=1e-3)


def forbidden(logits: Tensor, *words: int) -> Tensor:
    return logits.index_fill(-1, torch.tensor(words), -INF)


def test_words_that_both_forbid_are_as_if_they_were_not_there() -> None:
    student, teacher = logits(1.0, torch.float32, 40)
    for loss in losses(2.0):
        value, gradient = value_and_gradient(loss, forbidden(student, 3, 7), forbidden(teacher, 3, 7))
        keep = [i for i in range(40) if i not in (3, 7)]
        expected, of_rest = value_and_gradient(loss, student[:, keep], teacher[:, keep])
        scale = 38 / 40 if isinstance(loss, ps.losses.LogitsMSE) else 1.0
        assert value == pytest.approx(scale * expected, rel=1e-6)
        torch.testing.assert_close(gradient[:, keep], scale * of_rest, rtol=1e-5, atol=1e-9)
        assert gradient[:, [3, 7]].abs().max() == 0.0


def test_words_that_one_forbids_cost_what_the_definition_says() -> None:
    """Only a student that forbids what its teacher says has an infinite forward divergence, and the other way round."""
    student, teacher = logits(1.0, torch.float32, 40)
    for loss in losses(2.0):
        for pair in ((forbidden(student, 5), teacher), (student, forbidden(teacher, 5))):
            value = loss(*pair, None)[loss.part].item()
            expected = by_definition(loss, *pair).mean().item()
            assert value == (pytest.approx(expected, rel=1e-6) if expected < INF else INF), loss
            if value < INF:
                assert value_and_gradient(loss, *pair)[1].isfinite().all()


def test_logits_that_are_not_numbers_are_not_hidden() -> None:
    student, teacher = logits(1.0, torch.float32, 40)
    for loss in losses(1.0):
        for pair in ((student.index_fill(-1, torch.tensor(2), torch.nan), teacher), (student, teacher * torch.nan)):
            assert loss(*pair, None)[loss.part].isnan()


def test_extreme_logits_stay_finite() -> None:
    student, teacher = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    for loss in losses(1.0):
        value, gradient = value_and_gradient(loss, student, teacher)
        assert 0.0 < value < INF
        assert gradient.isfinite().all()


def test_top_k_with_as_many_as_there_are_is_the_forward_divergence() -> None:
    student, teacher = logits(1.0, torch.float32, 40)
    for k in (40, 1000):
        value, gradient = value_and_gradient(ps.losses.TopKKL(k, 2.0), student, teacher)
        expected, by_logits = value_and_gradient(ps.losses.ForwardKL(2.0), student, teacher)
        assert value == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(gradient, by_logits)
