"""Networks whose blocks do what the whole does, and which are the published ones where they say so."""

from __future__ import annotations

import pytest
import torch

from pipestill.model.blocks import BlockModel
from pipestill.recipes.compress import SHAPES
from pipestill.recipes.networks import RESNETS, Shape, halvings, network

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
    assert {"conv1.weight", "layer4.1.conv2.weight", "layer3.0.downsample.1.bias", "fc.weight"} <= set(resnet.state_dict())


def test_the_last_stages_halve_as_far_as_there_is_room() -> None:
    assert halvings(5, 224) == halvings(5, 32) == [True] * 5
    assert halvings(5, 8) == [False, False, True, True, True]
    assert halvings(2, 1) == [False, False]


def test_the_same_seed_gives_the_same_network() -> None:
    one, same, other = (network(SMALL["vgg"], 3, 8, 5, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["features.0.weight"], other["features.0.weight"])


def test_resnets_are_the_published_ones() -> None:
    """Torchvision's parameters, in number and in name; bottlenecks halve the image in their 3x3 convolution."""
    with torch.device("meta"):
        models = {name: network(shape, 3, 224, 1000) for name, shape in RESNETS.items()}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert counts == {
        "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "resnet101": 44_549_160,
        "resnet152": 60_192_808,
    }  # fmt: skip
    assert {"layer1.0.conv3.weight", "layer1.0.downsample.0.weight", "layer3.35.bn3.running_var"} <= set(
        models["resnet152"].state_dict()
    )
    strides = {name: m.stride for name, m in models["resnet50"].named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert strides["layer2.0.conv2"] == strides["layer2.0.downsample.0"] == (2, 2)
    assert strides["layer2.0.conv1"] == (1, 1)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_resnet_is_cut_at_its_residual_blocks_on_demand(bottleneck: bool) -> None:
    shape = Shape("resnet", (4, 6), (1, 2), bottleneck=bottleneck)
    model = network(shape, 3, 96, 5, cuts="residual").eval()
    blocks = BlockModel(model)
    assert [block.name for block in blocks.blocks] == ["stem", "layer1.0", "layer2.0", "layer2.1", "classifier"]
    images = torch.rand(2, 3, 96, 96)
    assert torch.equal(blocks(images), model(images))
    assert len(BlockModel(network(shape, 3, 96, 5))) == 3, "two stages and a classifier"


def test_a_resnet_without_classes_gives_features() -> None:
    model = network(Shape("resnet", (4, 6), (1, 1), bottleneck=True), 3, 16, 0)
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, model.num_features) == (2, 24)
