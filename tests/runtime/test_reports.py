"""Means of metrics over microbatches of different sizes."""

import pytest
import torch
from torch import nn

import pipestill as ps
from pipestill.errors import ConfigError, ModelError
from pipestill.losses import accuracy, counted, cross_entropy, perplexity
from pipestill.runtime.reports import MetricMeans

OUTPUT = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[1, -100], [2, 3], [-100, -100], [0, -100], [-100, 1]])


def test_metrics_that_count_are_means_over_what_counts() -> None:
    """A mean of means would weigh the labels of a microbatch by how few there are."""
    metrics = {"accuracy": accuracy, "perplexity": perplexity, "cross_entropy": cross_entropy, "size": lambda o, y: o.mean()}
    means = MetricMeans(metrics)
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        means.add(OUTPUT[rows], LABELS[rows], rows.stop - rows.start)
    got = means.means()
    assert got["accuracy"] == pytest.approx(accuracy(OUTPUT, LABELS).item())
    assert got["cross_entropy"] == pytest.approx(cross_entropy(OUTPUT, LABELS)["cross_entropy"].item(), rel=1e-6)
    assert got["perplexity"] == pytest.approx(perplexity(OUTPUT, LABELS).item(), rel=1e-6)
    assert got["size"] == pytest.approx(OUTPUT.mean().item(), rel=1e-5)


def test_a_metric_of_your_own_that_counts() -> None:
    top2 = counted(lambda o, y: (o.topk(2).indices == y[..., None]).any(-1)[y != -100].sum(), lambda y: (y != -100).sum())
    means = MetricMeans({"top2": top2})
    for row in range(5):
        means.add(OUTPUT[row : row + 1], LABELS[row : row + 1], 1)
    assert means.means()["top2"] == pytest.approx(top2(OUTPUT, LABELS).item())


def test_validation_data_in_which_nothing_counts() -> None:
    means = MetricMeans({"accuracy": accuracy})
    means.add(OUTPUT[2:3], LABELS[2:3], 1)
    with pytest.warns(UserWarning, match="nothing in the validation data counts for metric 'accuracy'.*; it is given as 0"):
        assert means.means() == {"accuracy": 0.0}


def test_metrics_that_are_none() -> None:
    with pytest.raises(ConfigError, match=r"metric 'a' gave a tensor of shape \(5, 2\); expected a scalar"):
        MetricMeans({"a": lambda o, y: o.argmax(-1)}).add(OUTPUT, LABELS, 5)
    with pytest.raises(ModelError, match=r"counts\(target\) of metric 'a' gave -1"):
        MetricMeans({"a": counted(lambda o, y: o.sum(), lambda y: -1)}).add(OUTPUT, LABELS, 5)


@pytest.mark.parametrize(("strategy", "devices", "microbatches"), [("reference", 1, 1), ("gpipe", 2, 3)])
def test_validations_count_tokens(strategy: str, devices: int, microbatches: int) -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    task = ps.Supervised(student, ps.losses.cross_entropy)
    trainer = ps.Trainer(
        task, lr=0.0, strategy=strategy, devices=devices, microbatches=microbatches, device="cpu",
        metrics={"cross_entropy": ps.losses.cross_entropy},
    )  # fmt: skip
    ids = LABELS.clamp(min=0)
    batches = [(ids[:3], LABELS[:3]), (ids[3:], LABELS[3:])]
    result = trainer.fit(batches, validate=batches)
    wanted = ps.losses.cross_entropy(student(ids), LABELS)["cross_entropy"].item()
    assert result.metrics["cross_entropy"] == pytest.approx(wanted, rel=1e-5)
