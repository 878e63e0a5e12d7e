"""Metrics are means over the labels that count."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.outputs import STUDENT, TARGET, TEACHER

from pipestill.errors import ModelError
from pipestill.losses import Accuracy, LinearLogits, accuracy, agreement, perplexity

LABELS = torch.tensor([[1, -100, 3], [-100, 3, -100]])


def logits() -> torch.Tensor:
    """Two sequences of three tokens, of which two of the three labels are predicted."""
    found = torch.zeros(2, 3, 4)
    found[0, 0, 1] = found[1, 1, 3] = found[1, 2, 0] = found[0, 2, 0] = 1.0
    return found


def test_accuracy_is_a_fraction_of_rows() -> None:
    assert accuracy(STUDENT, TARGET).item() == 1.0
    assert accuracy(STUDENT, torch.tensor([0, 2])).item() == 0.5
    assert accuracy(STUDENT, TARGET).dtype == torch.float64


def test_accuracy_of_tokens_is_over_their_labels() -> None:
    assert accuracy({"logits": logits()}, LABELS).item() == pytest.approx(2 / 3)
    assert (accuracy.counts(LABELS), accuracy.sums(logits(), {"labels": LABELS}).item()) == (3.0, 2.0)
    assert Accuracy(ignore_index=1)(logits(), LABELS.clamp(min=1)).item() == pytest.approx(1 / 2)
    assert accuracy(logits(), torch.full((2, 3), -100)).item() == 0.0


def test_accuracy_of_a_head_inside_the_loss() -> None:
    hidden, weight = torch.randn(2, 3, 5), torch.randn(4, 5)
    assert torch.equal(accuracy(LinearLogits(hidden, weight), LABELS), accuracy(hidden @ weight.T, LABELS))


def test_perplexity_is_that_of_the_mean_over_all_labels() -> None:
    chosen = LABELS != -100
    expected = math.exp(F.cross_entropy(logits()[chosen], LABELS[chosen]).item())
    assert perplexity(logits(), LABELS).item() == pytest.approx(expected, rel=1e-6)
    sums = sum(perplexity.sums(logits()[i : i + 1], LABELS[i : i + 1]).item() for i in range(2))
    assert perplexity.of_mean(sums / perplexity.counts(LABELS)) == pytest.approx(expected, rel=1e-6)
    assert math.isfinite(perplexity.of_mean(1e9))


def test_agreement_of_two_models() -> None:
    assert agreement((STUDENT, TEACHER), TARGET).item() == 0.5
    assert agreement((STUDENT, TEACHER), torch.tensor([-100, 0])).item() == 1.0
    with pytest.raises(ModelError, match="agreement got Tensor; expected the outputs of two models"):
        agreement(STUDENT, TARGET)
