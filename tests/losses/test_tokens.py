"""Cross entropy and accuracy of tokens: means over the labels that count."""

import pytest
import torch
import torch.nn.functional as F

from pipestill.errors import DataError, ModelError
from pipestill.losses import LinearLogits, TokenAccuracy, TokenCrossEntropy

LABELS = torch.tensor([[1, -100, 2], [-100, -100, 0], [-100, -100, -100]])


def logits(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_the_cross_entropy_is_the_mean_over_labels_that_count() -> None:
    loss, chosen = TokenCrossEntropy(), LABELS != -100
    wanted = F.cross_entropy(logits()[chosen], LABELS[chosen])
    assert loss(logits(), LABELS).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert loss.counts({"labels": LABELS}) == 3.0
    parts = [loss.sums({"logits": logits()[i : i + 1]}, {"labels": LABELS[i : i + 1]}) for i in range(3)]
    assert torch.stack(parts).sum().item() / 3 == pytest.approx(wanted.item(), rel=1e-6)
    assert loss(logits(torch.bfloat16), LABELS).dtype == torch.float32


def test_nothing_that_counts_is_0_and_not_nan() -> None:
    given = logits()[2:].requires_grad_()
    value = TokenCrossEntropy()(given, LABELS[2:])
    value.backward()
    assert value.item() == 0.0
    assert given.grad is not None and not given.grad.any()
    assert TokenAccuracy()(logits()[2:], LABELS[2:]).item() == 0.0


def test_the_accuracy_is_over_labels_that_count() -> None:
    right = F.one_hot(LABELS.clamp(min=0), 5).float()
    right[0, 2] = 0.0  # its largest is then the first
    assert TokenAccuracy()(right, LABELS).item() == pytest.approx(2 / 3)


def test_what_has_no_labels_or_other_labels_is_refused() -> None:
    with pytest.raises(DataError, match="expected class indices"):
        TokenCrossEntropy()(logits(), None)
    with pytest.raises(DataError, match=r"labels are \(3, 2\), but the logits are \(3, 3, 5\)"):
        TokenCrossEntropy()(logits(), LABELS[:, :2])
    with pytest.raises(ModelError, match="not computed yet"):
        TokenCrossEntropy()(LinearLogits(torch.zeros(3, 3, 2), torch.zeros(5, 2)), LABELS)
