"""VGG and ResNet of any widths, with whole or depthwise-separable convolutions, cut at their stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from pipestill.model.block import Block
from pipestill.model.seeding import seeded

_LARGE = 64  # pixels: ResNets of larger images begin with a 7x7 convolution and a pooling, both of stride 2


@dataclass(frozen=True)
class Shape:
    """The shape of a convolutional network.

    `widths` are the channels of each stage, `depths` its convolutions (VGG) or residual blocks (ResNet), and `hidden` the units
    of the hidden layers of a VGG's classifier.

    A ResNet's residual block is of two 3x3 convolutions or, with `bottleneck`, a 3x3 one between two of 1x1, the last of
    which widens to 4 times the stage's channels. VGG-16 is Shape("vgg", (64, 128, 256, 512, 512), (2, 2, 3, 3, 3), (4096,
    4096)); `RESNETS` has those of the usual names.
    """

    family: str
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    hidden: tuple[int, ...] = ()
    bottleneck: bool = False


_RESNET = (64, 128, 256, 512)
RESNETS = {
    "resnet18": Shape("resnet", _RESNET, (2, 2, 2, 2)),
    "resnet34": Shape("resnet", _RESNET, (3, 4, 6, 3)),
    "resnet50": Shape("resnet", _RESNET, (3, 4, 6, 3), bottleneck=True),
    "resnet101": Shape("resnet", _RESNET, (3, 4, 23, 3), bottleneck=True),
    "resnet152": Shape("resnet", _RESNET, (3, 8, 36, 3), bottleneck=True),
}
"""He et al. 2016, table 1."""

Cuts = Literal["stages", "residual"]


def network(
    shape: Shape,
    channels: int,
    size: int,
    classes: int,
    *,
    norm: bool = True,
    separable: bool = False,
    seed: int = 0,
    cuts: Cuts = "stages",
) -> nn.Module:
    """Build a network for images (rows, channels, size, size) -> logits (rows, classes), initialised from `seed`.

    `norm`: batch norm after each convolution (ResNets always have it). `separable`: 3x3 convolutions are depthwise-separable.
    `classes` of 0: a ResNet without its linear layer, for features (rows, `num_features`).

    One block a stage, and one for the classifier. Other networks of as many stages and the same widths give outputs of
    the same form at each of these cuts, whatever their depths. With `cuts` of "residual" a ResNet has a block for each of its
    residual ones instead, and one for what is before them: more to choose from for a level pipeline.
    """
    if shape.family == "resnet":
        return seeded(seed, lambda: ResNet(shape, channels, size, classes, separable, cuts))
    return seeded(seed, lambda: VGG(shape, channels, size, classes, norm, separable))


class VGG(nn.Module):
    """Stages of 3x3 convolutions, each followed by a 2x2 max pooling (Simonyan and Zisserman 2015).

    Where an image is too small for a pooling after every stage, the first stages have none. The state has torchvision's
    names, so its `vgg16_bn` weights fit VGG-16 for images of 224 x 224.
    """

    def __init__(self, shape: Shape, channels: int, size: int, classes: int, norm: bool, separable: bool) -> None:
        super().__init__()
        halved = halvings(len(shape.widths), size)
        layers: list[nn.Module] = []
        self.ends: list[int] = []
        for width, depth, halves in zip(shape.widths, shape.depths, halved, strict=True):
            for _ in range(depth):
                layers.append(convolution(channels, width, separable=separable, bias=not separable))
                layers += [nn.BatchNorm2d(width), nn.ReLU()] if norm else [nn.ReLU()]
                channels = width
            if halves:
                layers.append(nn.MaxPool2d(2))
            self.ends.append(len(layers))
        self.features = nn.Sequential(*layers)
        side = size // 2 ** sum(halved) if shape.hidden else 1  # without hidden layers, the image is averaged
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        units = [channels * side * side, *shape.hidden]
        hidden = [layer for before, after in pairwise(units) for layer in (nn.Linear(before, after), nn.ReLU(), nn.Dropout())]
        self.classifier = nn.Sequential(*hidden, nn.Linear(units[-1], classes))
        self.apply(_initialise)

    def pipeline_blocks(self) -> list[str | Block]:
        layers, blocks = list(self.features), list[str | Block]()
        for number, (first, end) in enumerate(zip([0, *self.ends], self.ends, strict=False)):
            uses = tuple(f"features.{i}" for i in range(first, end))
            blocks.append(Block(f"stage{number + 1}", partial(_through, layers[first:end]), uses))
        return [*blocks, Block("classifier", self._classify, ("classifier",))]

    def forward(self, x: Tensor) -> Tensor:
        return self._classify(self.features(x))

    def _classify(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Stages of residual blocks, each stage but the first halving the image (He et al. 2016).

    Where an image is too small for that, further stages at the front do not. Bottlenecks halve it in their 3x3 convolution.
    The state has torchvision's names, so its weights of `resnet18` to `resnet152` fit these for images of 224 x 224. `cuts`:
    see `network`; cut at its stages, the first block holds the first convolution too.
    """

    def __init__(self, shape: Shape, channels: int, size: int, classes: int, separable: bool, cuts: Cuts = "stages") -> None:
        super().__init__()
        self.cuts = cuts
        large, width = size > _LARGE, shape.widths[0]
        self.conv1 = nn.Conv2d(channels, width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        halved = [False, *halvings(len(shape.widths) - 1, size // 4 if large else size)]
        self.num_stages = len(shape.widths)
        for number, (after, depth, halves) in enumerate(zip(shape.widths, shape.depths, halved, strict=True)):
            blocks: list[nn.Module] = []
            for i in range(depth):
                stride = 2 if halves and i == 0 else 1
                blocks.append((Bottleneck if shape.bottleneck else Residual)(width, after, stride, separable))
                width = after * (Bottleneck.expansion if shape.bottleneck else 1)
            self.add_module(f"layer{number + 1}", nn.Sequential(*blocks))
        self.num_features = width
        self.fc = nn.Linear(width, classes) if classes else nn.Identity()
        self.apply(_initialise)

    def pipeline_blocks(self) -> list[str | Block]:
        if self.cuts == "residual":
            return self.residual_blocks()
        stages: list[str | Block] = [f"layer{number}" for number in range(2, self.num_stages + 1)]
        return [Block("layer1", self._begin, ("conv1", "bn1", "layer1")), *stages, Block("classifier", self._classify, ("fc",))]

    def residual_blocks(self) -> list[str | Block]:
        """List the blocks of a cut after every residual block."""
        stages = [f"layer{number}" for number in range(1, self.num_stages + 1)]
        inner = [f"{stage}.{name}" for stage in stages for name, _ in self.get_submodule(stage).named_children()]
        stem = Block("stem", self._stem, ("conv1", "bn1"))
        return [stem, *inner, Block("classifier", self._classify, ("fc",))]

    def forward(self, x: Tensor) -> Tensor:
        x = self._begin(x)
        for number in range(2, self.num_stages + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return self._classify(x)

    def _stem(self, x: Tensor) -> Tensor:
        return self.maxpool(torch.relu(self.bn1(self.conv1(x))))  # type: ignore[no-any-return]

    def _begin(self, x: Tensor) -> Tensor:
        return self.get_submodule("layer1")(self._stem(x))  # type: ignore[no-any-return]

    def _classify(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Two convolutions beside a shortcut: (rows, in, h, w) -> (rows, out, h / stride, w / stride)."""

    def __init__(self, channels: int, width: int, stride: int, separable: bool) -> None:
        super().__init__()
        self.conv1 = convolution(channels, width, stride, separable=separable)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, separable=separable)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        inside = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inside)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: (rows, in, h, w) -> (rows, 4 * width, h / stride, w / stride)."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, separable: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, stride, separable=separable)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = _shortcut(channels, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        inside = torch.relu(self.bn1(self.conv1(x)))
        inside = torch.relu(self.bn2(self.conv2(inside)))
        return torch.relu(self.bn3(self.conv3(inside)) + self.downsample(x))


def _shortcut(channels: int, width: int, stride: int) -> nn.Module:
    """Build what brings a residual block's input to the form of its output."""
    if stride == 1 and channels == width:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))


class Separable(nn.Module):
    """A 3x3 convolution of each channel alone, then one that mixes them (Howard et al. 2017, section 3.1).

    (rows, in, h, w) -> (rows, out, h / stride, w / stride). Weights: 9 in + in out, where a whole convolution has 9 in out.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(torch.relu(self.norm(self.depthwise(x))))  # type: ignore[no-any-return]


def convolution(channels: int, width: int, stride: int = 1, *, separable: bool, bias: bool = False) -> nn.Module:
    """Build a 3x3 convolution that keeps an image's size or divides it by `stride`; of images themselves always a whole one."""
    if separable and channels > 3:
        return Separable(channels, width, stride)
    return nn.Conv2d(channels, width, 3, stride, padding=1, bias=bias)


def halvings(stages: int, size: int) -> list[bool]:
    """Find which stages halve an image of `size` pixels: the last ones, as many as it has room for."""
    room = size.bit_length() - 1
    return [stages - stage <= room for stage in range(stages)]


def _through(layers: Sequence[nn.Module], value: Tensor) -> Tensor:
    for layer in layers:
        value = layer(value)
    return value


def _initialise(module: nn.Module) -> None:
    """Initialise a convolution as He et al. 2015 do, so that deep stacks without batch norm can be trained too."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.groups > 1:  # a channel alone: the fan-out above counts all of them
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
