"""Losses that count what they are the mean over."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipestill.errors import ModelError
from pipestill.losses import SoftTarget, counted
from pipestill.losses.counted import counts_of, means, with_sums

OUTPUT, TARGET = torch.randn(6, 3), torch.tensor([0, 1, -100, 2, -100, 0])
WEIGHT = torch.tensor([1.0, 2.0, 0.5])


def weights_of(target: Tensor) -> Tensor:
    return WEIGHT[target[target >= 0]].sum()


def test_a_counted_function_gives_means_by_itself() -> None:
    loss = counted(nn.CrossEntropyLoss(WEIGHT, reduction="sum"), weights_of)
    expected = F.cross_entropy(OUTPUT, TARGET, WEIGHT)
    assert loss(OUTPUT, TARGET).item() == pytest.approx(expected.item(), rel=1e-6)
    assert counts_of(loss, TARGET) == {"loss": 4.5}
    assert with_sums(loss, OUTPUT, TARGET).item() == pytest.approx(4.5 * expected.item(), rel=1e-6)  # type: ignore[union-attr]
    assert [name for name, _ in loss.named_buffers()] == ["function.weight"]


def test_parts_without_a_count_stay_means_over_rows() -> None:
    def sums(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"labels": F.cross_entropy(output, target, reduction="sum"), "size": output.square().mean()}

    loss = counted(sums, lambda target: {"labels": (target >= 0).sum()})
    parts = loss(OUTPUT, TARGET)
    assert parts["labels"].item() == pytest.approx(F.cross_entropy(OUTPUT, TARGET).item(), rel=1e-6)
    assert torch.equal(parts["size"], OUTPUT.square().mean())


@pytest.mark.parametrize("target", [torch.full((6,), -100), torch.zeros(0, dtype=torch.int64)])
def test_nothing_counted_is_0_and_not_nan(target: Tensor) -> None:
    output = torch.randn(len(target), 3, requires_grad=True)
    parts = SoftTarget()(output, torch.randn(len(target), 3), target)
    assert parts["soft_target"].item() == parts["cross_entropy"].item() == 0.0  # type: ignore[index]
    sum(parts.values()).backward()  # type: ignore[union-attr]
    assert output.grad is not None
    assert not output.grad.any()
    assert means(torch.tensor(0.0), 0).item() == 0.0  # type: ignore[union-attr]


def test_counts_of_a_scalar_may_be_named_loss() -> None:
    loss = counted(lambda output, target: output.sum(), lambda target: {"loss": len(target)})
    assert loss(OUTPUT, TARGET).item() == pytest.approx(OUTPUT.sum().item() / 6)
    with pytest.raises(ModelError, match=r"counts\(target\) names 'labels', and the loss has the parts loss"):
        counted(lambda output, target: output.sum(), lambda target: {"labels": 1})(OUTPUT, TARGET)


def test_a_loss_without_counts_is_called() -> None:
    class Both:
        def __call__(self, output: Tensor) -> Tensor:
            return output.mean()

        def sums(self, output: Tensor) -> Tensor:
            return output.sum()

    assert counts_of(Both(), None) == {}
    assert torch.equal(with_sums(Both(), OUTPUT), OUTPUT.mean())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (lambda target: {"loss": -1.0}, r"gave -1.0 for 'loss'; expected finite numbers, 0 or more"),
        (lambda target: float("nan"), "gave nan for 'loss'"),
        (lambda target: torch.ones(2), r"counts\(target\) of the loss failed: .*; expected a number, or a dict of"),
        (lambda target: target.labels.sum(), "counts.target. of the loss failed: AttributeError"),
    ],
)
def test_counts_that_are_none(counts: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        counts_of(counted(F.cross_entropy, counts), TARGET)
