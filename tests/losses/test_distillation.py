"""Losses of outputs and a target against the formulas that they come from."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.outputs import STUDENT, TARGET, TEACHER, softmax
from torch import Tensor

from pipestill.errors import ConfigError
from pipestill.losses import Cosine, LogitsMSE, MaskedDistillation, SoftTarget, accuracy, cross_entropy


def test_soft_target_by_hand() -> None:
    parts = SoftTarget(temperature=2.0, weight=0.3)(STUDENT, TEACHER, TARGET)
    divergence = sum(
        t * math.log(t / s)
        for a, b in zip(STUDENT, TEACHER, strict=True)
        for s, t in zip(softmax(a, 2.0), softmax(b, 2.0), strict=True)
    )
    labels = -sum(math.log(softmax(row, 1.0)[label]) for row, label in zip(STUDENT, TARGET.tolist(), strict=True))
    assert list(parts) == ["soft_target", "cross_entropy"]
    assert parts["soft_target"].item() == pytest.approx(0.3 * 4.0 * divergence / 2, rel=1e-5)
    assert parts["cross_entropy"].item() == pytest.approx(labels / 2, rel=1e-5)


def test_soft_target_without_labels() -> None:
    assert list(SoftTarget()(STUDENT, TEACHER, None)) == ["soft_target"]
    assert SoftTarget()(STUDENT, STUDENT, None)["soft_target"].item() == pytest.approx(0.0, abs=1e-7)


def test_soft_target_of_sequences_is_the_mean_over_positions() -> None:
    student, teacher, target = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.randint(5, (3, 4))
    parts = SoftTarget()(student, teacher, target)
    flat = SoftTarget()(student.view(12, 5), teacher.view(12, 5), target.view(12))
    assert {n: p.item() for n, p in parts.items()} == {n: p.item() for n, p in flat.items()}


@pytest.mark.parametrize("loss", [SoftTarget(), LogitsMSE(2.0), Cosine(0.5)])
def test_the_mean_over_rows_is_what_microbatches_add_up_to(loss: SoftTarget | LogitsMSE | Cosine) -> None:
    student, teacher, target = torch.randn(7, 4).double(), torch.randn(7, 4).double(), torch.randint(4, (7,))
    whole = loss(student, teacher, target)
    parts = [(loss(student[i:j], teacher[i:j], target[i:j]), (j - i) / 7) for i, j in ((0, 3), (3, 5), (5, 7))]
    for name, value in whole.items():
        assert value.item() == pytest.approx(sum(part[name].item() * share for part, share in parts), rel=1e-12)


def test_gradients_reach_the_student_only() -> None:
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone()
    sum(SoftTarget()(student, teacher, TARGET).values()).backward()  # type: ignore[union-attr]
    assert student.grad is not None and student.grad.isfinite().all()


def test_logits_mse() -> None:
    expected = ((STUDENT - TEACHER) ** 2).mean().item() * 0.5
    assert LogitsMSE(0.5)(STUDENT, TEACHER, None)["logits_mse"].item() == pytest.approx(expected)


def test_cosine() -> None:
    a, b = STUDENT, TEACHER
    expected = [1 - float(x @ y) / (float(x.norm()) * float(y.norm())) for x, y in zip(a, b, strict=True)]
    assert Cosine(3.0)(a, b, None)["cosine"].item() == pytest.approx(3 * sum(expected) / 2, rel=1e-5)
    assert Cosine()(a, 5 * a, None)["cosine"].item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("loss", [SoftTarget(), LogitsMSE(), Cosine()])
@pytest.mark.parametrize("teacher", [torch.zeros(2, 1), torch.zeros(1, 3), torch.zeros(3), torch.zeros(2, 4)])
def test_nothing_is_broadcast(loss: SoftTarget | LogitsMSE | Cosine, teacher: Tensor) -> None:
    """A teacher of one class, or of one row, would give a loss all the same."""
    with pytest.raises(ValueError, match=r"student \(2, 3\) and teacher \(.*\) differ in shape"):
        loss(STUDENT, teacher, TARGET)


@pytest.mark.parametrize(("temperature", "weight"), [(0.0, 1.0), (-1.0, 1.0), (1.0, -0.5)])
def test_impossible_settings(temperature: float, weight: float) -> None:
    with pytest.raises(ConfigError, match="expected (more than 0|0 or more)"):
        SoftTarget(temperature, weight)


def masked_case() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Two sequences of three tokens, of which the last is padding; two of the five are masked."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        {"logits": torch.randn(2, 3, 4, generator=generator), "last_hidden_state": torch.randn(2, 3, 5, generator=generator)}
        for _ in range(2)
    )
    labels, tokens = torch.tensor([[1, -100, -100], [-100, 1, -100]]), torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    return student, teacher, {"labels": labels, "tokens": tokens}


def test_masked_distillation_by_hand() -> None:
    student, teacher, target = masked_case()
    parts = MaskedDistillation(2.0, 5.0, 2.0, 1.0)(student, teacher, target)
    real, masked = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)], [(0, 0), (1, 1)]
    divergence = sum(
        t * math.log(t / s)
        for at in real
        for s, t in zip(softmax(student["logits"][at], 2.0), softmax(teacher["logits"][at], 2.0), strict=True)
    )
    labels = -sum(math.log(softmax(student["logits"][at], 1.0)[int(target["labels"][at])]) for at in masked)
    hidden = sum(
        1 - float(F.cosine_similarity(student["last_hidden_state"][at], teacher["last_hidden_state"][at], dim=0)) for at in real
    )
    assert list(parts) == ["soft_target", "cross_entropy", "cosine"]
    assert parts["soft_target"].item() == pytest.approx(5.0 * 4.0 * divergence / 5, rel=1e-5)
    assert parts["cross_entropy"].item() == pytest.approx(2.0 * labels / 2, rel=1e-5)
    assert parts["cosine"].item() == pytest.approx(hidden / 5, rel=1e-5)
    right = sum(int(student["logits"][at].argmax()) == int(target["labels"][at]) for at in masked)
    assert MaskedDistillation(2.0, 5.0, 2.0, 1.0).counts(target) == {"soft_target": 5.0, "cross_entropy": 2.0, "cosine": 5.0}
    assert accuracy(student, target).item() == pytest.approx(right / 2)
    assert cross_entropy(student, target)["cross_entropy"].item() == pytest.approx(labels / 2, rel=1e-5)


def test_masked_distillation_refuses_and_leaves_out() -> None:
    student, teacher, target = masked_case()
    assert list(MaskedDistillation(soft_target=0.0)(student, teacher, target)) == ["cross_entropy", "cosine"]
    wide = {**teacher, "last_hidden_state": torch.randn(2, 3, 7)}
    assert list(MaskedDistillation(cosine=0.0)(student, wide, target)) == ["soft_target", "cross_entropy"]
    with pytest.raises(ValueError, match=r"student \(2, 3, 5\) and teacher \(2, 3, 7\) differ"):
        MaskedDistillation()(student, wide, target)
    with pytest.raises(ValueError, match="differ in shape"):
        MaskedDistillation()(student, {**teacher, "logits": torch.randn(2, 3, 9)}, target)
    for wrong in ({"temperature": 0.0}, {"cosine": -1.0}, {"soft_target": 0.0, "cross_entropy": 0.0, "cosine": 0.0}):
        with pytest.raises(ValueError, match="expected > 0"):
            MaskedDistillation(**wrong)
