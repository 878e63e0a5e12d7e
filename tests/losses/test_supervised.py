"""The loss of a classifier without a teacher is torch's; metrics are means over rows, in float64."""

import pytest
import torch
import torch.nn.functional as F
from support.outputs import STUDENT, TARGET

from pipestill.losses import accuracy, cross_entropy, masked_accuracy


def test_accuracy_is_a_fraction_of_rows() -> None:
    assert accuracy(STUDENT, TARGET).item() == 1.0
    assert accuracy(STUDENT, torch.tensor([0, 2])).item() == 0.5
    assert accuracy(STUDENT, TARGET).dtype == torch.float64


def test_masked_accuracy_counts_masked_tokens_by_their_weights() -> None:
    """Two sequences of three tokens; one masked token in each, the first of them predicted."""
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 1] = logits[1, 1, 3] = logits[1, 2, 0] = 1.0
    masked = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    target = {"labels": torch.tensor([[1, 0, 3], [2, 1, 0]]), "masked": masked * 2 / 2}
    assert masked_accuracy({"logits": logits}, target).item() == pytest.approx(0.5)


def test_cross_entropy_is_that_of_torch() -> None:
    assert torch.equal(cross_entropy(STUDENT, TARGET)["cross_entropy"], F.cross_entropy(STUDENT, TARGET))
