"""Batch norm policies: the same in a pipeline and in the plain loop, and what each does to the running statistics."""

import copy
from functools import cache

import pytest
import torch
from support.fits import Outcome
from support.momentum import MOMENTUM_CASES
from torch import nn

from pipestill.errors import ConfigError, ModelError
from pipestill.model.batchnorm import batch_norms, check_norms
from pipestill.model.blocks import BlockModel


def test_deferred_statistics_are_those_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    rows, layer = torch.randn(12, 4), nn.BatchNorm1d(4)
    whole = copy.deepcopy(layer)
    whole(rows)
    model = BlockModel(nn.Sequential(layer))
    with batch_norms("deferred", [model]) as norms:
        for part in rows.split(5):
            layer(part)
        assert torch.equal(layer.running_mean, torch.zeros(4))  # not before the batch is over
        norms.end_batch(model.model.modules())
    assert layer.track_running_stats
    assert int(layer.num_batches_tracked) == 1
    torch.testing.assert_close(layer.running_mean, whole.running_mean)
    torch.testing.assert_close(layer.running_var, whole.running_var)


def test_frozen_statistics_stay() -> None:
    layer = nn.BatchNorm1d(4)
    model = BlockModel(nn.Sequential(layer))
    with batch_norms("frozen", [model]):
        model.in_mode(train=False)
        model.in_mode(train=True)
        layer(torch.randn(12, 4))
        assert model.model.training and not layer.training
    assert torch.equal(layer.running_mean, torch.zeros(4))


@cache
def reference(policy: str) -> Outcome:
    return MOMENTUM_CASES["byol"].run("reference", batch_norm=policy)


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize("policy", ["deferred", "frozen"])
@pytest.mark.parametrize(("strategy", "devices"), [("fill", 1), ("fill", 2), ("gpipe", 3)])
def test_a_pipeline_equals_the_plain_loop(policy: str, strategy: str, devices: int) -> None:
    got = MOMENTUM_CASES["byol"].run(strategy, devices, batch_norm=policy)
    expected, other = reference(policy), reference("microbatch")
    assert all(torch.equal(tensor, got.state[name]) for name, tensor in expected.state.items())
    assert any(not torch.equal(tensor, other.state[name]) for name, tensor in expected.state.items())


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="no batch norm policy 'defered' .did you mean 'deferred'"):
        check_norms("defered", [])
    with pytest.raises(ModelError, match="'0' is a SyncBatchNorm, which averages over ranks"):
        check_norms("microbatch", [BlockModel(nn.Sequential(nn.SyncBatchNorm(4)))])
