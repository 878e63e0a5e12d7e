"""The loss of a classifier or a language model without a teacher is torch's."""

import pytest
import torch
import torch.nn.functional as F
from support.outputs import STUDENT, TARGET

from pipestill.errors import DataError
from pipestill.losses import CrossEntropy, LinearLogits, cross_entropy


def test_cross_entropy_is_that_of_torch() -> None:
    expected = F.cross_entropy(STUDENT.double(), TARGET)
    assert cross_entropy(STUDENT, TARGET)["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_of_tokens_counts_their_labels(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 4, 7).to(dtype).requires_grad_()
    labels = torch.randint(0, 7, (3, 4))
    labels[0, 1:] = labels[2] = -100
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact.flatten(0, 1), labels.flatten())
    assert cross_entropy.counts(labels) == {"cross_entropy": 5.0}
    for given, target in ((logits, labels), ({"logits": logits}, {"labels": labels})):
        got = cross_entropy(given, target)["cross_entropy"]
        assert got.item() == pytest.approx(expected.item(), rel=1e-6)
        assert cross_entropy.sums(given, target)["cross_entropy"].item() == pytest.approx(5 * expected.item(), rel=1e-6)
    got.backward()
    expected.backward()
    assert torch.allclose(logits.grad.double(), exact.grad, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-9)


def test_nothing_that_counts_is_0_and_not_nan() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    value = cross_entropy(logits, torch.tensor([-100, -100]))["cross_entropy"]
    value.backward()
    assert value.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_head_inside_the_loss() -> None:
    hidden, weight, labels = torch.randn(2, 3, 4), torch.randn(7, 4), torch.tensor([[1, 2, -100], [6, 0, 3]])
    got = cross_entropy(LinearLogits(hidden, weight), labels)["cross_entropy"]
    assert got.item() == pytest.approx(cross_entropy(hidden @ weight.T, labels)["cross_entropy"].item(), rel=1e-5)


def test_what_is_no_label_is_refused() -> None:
    with pytest.raises(DataError, match=r"the target is torch.float32 \(2,\); expected labels"):
        cross_entropy(STUDENT, torch.rand(2))
    with pytest.raises(DataError, match="the target is NoneType; expected labels"):
        cross_entropy.counts(None)
    with pytest.raises(DataError, match=r"labels are \(1,\), but the logits are \(2, 3\); expected a label for each token"):
        cross_entropy(STUDENT, TARGET[:1])
    with pytest.raises(DataError, match="labels go from 1 to 9; expected 0 to 2, or -1 where none counts"):
        CrossEntropy(ignore_index=-1)(STUDENT, torch.tensor([1, 9]))
