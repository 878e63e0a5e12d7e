import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pipestill.errors import ConfigError
from pipestill.recipes import evaluate_features
from pipestill.recipes.evaluate_features import FeatureQuality, evenly, knn_accuracy, linear_accuracy
from pipestill.recipes.images import Images

CPU = torch.device("cpu")


def test_neighbours_vote_by_direction() -> None:
    known = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 2.0], [0.1, 1.0], [1.0, 0.2]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    asked = torch.tensor([[5.0, 0.0], [0.0, 0.1], [1.0, 0.1]])
    assert knn_accuracy(known, labels, asked, torch.tensor([0, 1, 0]), 3) == 1.0
    assert knn_accuracy(known, labels, asked, torch.tensor([1, 1, 1]), 3) == pytest.approx(1 / 3)
    assert knn_accuracy(known, labels, asked, torch.tensor([1, 1, 1]), 100) == 1.0, "all of five vote"


def test_a_linear_probe_needs_no_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = nn.functional.one_hot(labels, 3) * 1e-4 + 1e-6 * torch.randn(60, 3, generator=generator) + 7.0
    assert linear_accuracy(features[:30], labels[:30], features[30:], labels[30:]) == 1.0
    wrong = (labels[30:] + 1) % 3
    assert linear_accuracy(features[:30], labels[:30], features[30:], wrong) == 0.0
    with pytest.raises(ConfigError, match="one class only"):
        linear_accuracy(features[:1], labels[:1], features[30:], wrong)


def test_features_are_of_eval_mode_and_nothing_changes() -> None:
    labels = torch.arange(40) % 2
    images = torch.rand(40, 1, 8, 8)
    images[labels == 1, :, :, :4] += 3.0
    images[labels == 0, :, :, 4:] += 3.0
    data = Images(TensorDataset(images[:30], labels[:30]), TensorDataset(images[30:], labels[30:]), 1, 8, 2)
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 8)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    quality = FeatureQuality(data, lambda network: network, neighbours=3, batch_size=7)
    assert quality(network, CPU) == quality(network, CPU) == {"knn_accuracy": 1.0, "linear_accuracy": 1.0}
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    blind = FeatureQuality(data, lambda network: lambda x: network(x) * 0.0, neighbours=3)(network, CPU)
    assert blind["linear_accuracy"] == 0.5


def test_of_more_samples_evenly_many_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_by_class = TensorDataset(torch.arange(100))
    assert evenly(sorted_by_class, 100) is sorted_by_class
    assert [int(item[0]) for item in evenly(sorted_by_class, 30)][::5] == [0, 20, 40, 60, 80]  # type: ignore[attr-defined]
    monkeypatch.setattr(evaluate_features, "MOST", 10)
    labels = torch.arange(40) // 20
    data = TensorDataset(labels.view(-1, 1, 1, 1).float().expand(-1, 1, 8, 8).contiguous(), labels)
    quality = FeatureQuality(Images(data, data, 1, 8, 2), lambda network: network, neighbours=3)
    features, kept = quality._features(nn.Flatten(), data, CPU)
    assert features.shape == (10, 64)
    assert kept.tolist() == [0] * 5 + [1] * 5
