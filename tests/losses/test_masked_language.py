"""DistilBERT's loss against the formulas that it comes from."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.outputs import softmax
from torch import Tensor

from pipestill.losses import MaskedDistillation, masked_accuracy, masked_cross_entropy


def masked_case() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Two sequences of three tokens, of which the last is padding; two of the five are masked."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        {
            "logits": torch.randn(2, 3, 4, generator=generator),
            "last_hidden_state": torch.randn(2, 3, 5, generator=generator),
        }
        for _ in range(2)
    )
    labels = torch.tensor([[1, 0, 3], [2, 1, 0]])
    masked, tokens = torch.tensor([[1.0, 0, 0], [0, 1, 0]]), torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    return student, teacher, {"labels": labels, "masked": masked * 2 / 2, "tokens": tokens * 2 / 5}


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
        1 - float(F.cosine_similarity(student["last_hidden_state"][at], teacher["last_hidden_state"][at], dim=0))
        for at in real
    )
    assert list(parts) == ["soft_target", "cross_entropy", "cosine"]
    assert parts["soft_target"].item() == pytest.approx(5.0 * 4.0 * divergence / 5, rel=1e-5)
    assert parts["cross_entropy"].item() == pytest.approx(2.0 * labels / 2, rel=1e-5)
    assert parts["cosine"].item() == pytest.approx(hidden / 5, rel=1e-5)
    right = sum(int(student["logits"][at].argmax()) == int(target["labels"][at]) for at in masked)
    assert masked_accuracy(student, target).item() == pytest.approx(right / 2)
    assert masked_cross_entropy(student, target)["cross_entropy"].item() == pytest.approx(labels / 2, rel=1e-5)


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
