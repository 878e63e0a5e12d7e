"""What validations report: means of metrics over rows, or over what targets count for."""

import pytest
import torch
from torch import nn

import pipestill as ps
from pipestill.runtime.reports import MetricMeans

LOGITS = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[1, 2, 3], [4, -100, -100], [-100] * 3, [0, 1, -100]])


def test_a_metric_that_counts_is_a_mean_over_all_tokens_however_they_are_batched() -> None:
    metric = ps.losses.TokenCrossEntropy()
    wanted = metric(LOGITS, LABELS).item()
    for size in (1, 2, 3, 4):
        means = MetricMeans({"cross_entropy": metric, "rows": lambda output, target: output.mean()})
        for output, target in zip(LOGITS.split(size), LABELS.split(size), strict=True):
            means.add(output, target, len(output))
        assert means.means()["cross_entropy"] == pytest.approx(wanted, rel=1e-6)
        assert means.means()["rows"] == pytest.approx(LOGITS.mean().item(), abs=1e-6)


def test_a_metric_of_which_nothing_counts_is_0() -> None:
    means = MetricMeans({"accuracy": ps.losses.TokenAccuracy()})
    means.add(LOGITS[2:3], LABELS[2:3], 1)
    assert means.means() == {"accuracy": 0.0}


@pytest.mark.parametrize(("strategy", "devices", "microbatches"), [("reference", 1, 1), ("gpipe", 2, 3)])
def test_validations_count_tokens(strategy: str, devices: int, microbatches: int) -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    task = ps.Supervised(student, ps.losses.TokenCrossEntropy())
    trainer = ps.Trainer(
        task, lr=0.0, strategy=strategy, devices=devices, microbatches=microbatches, device="cpu",
        metrics={"cross_entropy": ps.losses.TokenCrossEntropy()},
    )  # fmt: skip
    ids = LABELS.clamp(min=0)
    batches = [(ids[:3], LABELS[:3]), (ids[3:], LABELS[3:])]
    result = trainer.fit(batches, validate=batches)
    wanted = ps.losses.TokenCrossEntropy()(student(ids), LABELS).item()
    assert result.metrics["cross_entropy"] == pytest.approx(wanted, rel=1e-5)
