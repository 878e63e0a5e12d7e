"""Networks whose blocks do what the whole does, and which are the published ones where they say so."""

from __future__ import annotations

import pytest
import torch

from pipestill.model.blocks import BlockModel
from pipestill.recipes.compress import SHAPES
from pipestill.recipes.networks import Shape, halvings, network

SMALL = {"vgg": Shape("vgg", (4, 6, 8), (1, 2, 1), (10,)), "resnet": Shape("resnet", (4, 6, 8), (1, 2, 1))}


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 96), (1, 9)])
def test_blocks_do_what_the_whole_does(family: str, separable: bool, channels: int, size: int) -> None:
    model = network(SMALL[family], channels, size, 5, separable=separable).eval()
    images = torch.rand(2, channels, size, size)
    blocks = BlockModel(model)
    assert len(blocks) == 4, "three stages and a classifier"
    assert torch.equal(blocks(images), model(images))
    assert model(images).shape == (2, 5)


@pytest.mark.parametrize("family", SMALL)
def test_networks_of_other_depths_fit_at_every_cut(family: str) -> None:
    one = network(SMALL[family], 3, 32, 5)
    two = network(Shape(family, SMALL[family].widths, (2, 1, 1)), 3, 32, 5, separable=True)
    value = torch.rand(2, 3, 32, 32)
    for mine, other in zip(BlockModel(one.eval()).blocks, BlockModel(two.eval()).blocks, strict=True):
        assert mine.call(value).shape == other.call(value).shape
        value = mine.call(value)


def test_published_networks_have_their_parameters() -> None:
    """Torchvision's vgg16_bn, vgg16 and resnet18, in number and in name."""
    with torch.device("meta"):
        vgg = network(SHAPES["imagenet", "vgg"][0], 3, 224, 1000)
        plain = network(SHAPES["imagenet", "vgg"][0], 3, 224, 1000, norm=False)
        resnet = network(SHAPES["imagenet", "resnet"][0], 3, 224, 1000)
    counts = [sum(p.numel() for p in model.parameters()) for model in (vgg, plain, resnet)]
    assert counts == [138_365_992, 138_357_544, 11_689_512]
    assert {"features.0.weight", "features.41.running_mean", "classifier.6.bias"} <= set(vgg.state_dict())
    assert {"features.28.weight", "classifier.0.weight"} <= set(plain.state_dict())
    assert {"conv1.weight", "layer4.1.conv2.weight", "layer3.0.downsample.1.bias", "fc.weight"} <= set(
        resnet.state_dict()
    )


def test_the_last_stages_halve_as_far_as_there_is_room() -> None:
    assert halvings(5, 224) == halvings(5, 32) == [True] * 5
    assert halvings(5, 8) == [False, False, True, True, True]
    assert halvings(2, 1) == [False, False]


def test_the_same_seed_gives_the_same_network() -> None:
    one, same, other = (network(SMALL["vgg"], 3, 8, 5, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["features.0.weight"], other["features.0.weight"])
