"""BYOL: two views of each image, a momentum teacher, no labels."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from pipestill.losses import byol
from pipestill.model.seeding import derive, seeded
from pipestill.model.tasks import Momentum
from pipestill.recipes.images import Images
from pipestill.recipes.networks import RESNETS, network
from pipestill.recipes.recipe import filled
from pipestill.recipes.self_supervised import TwoViews, rising
from pipestill.recipes.soft_target import convolutions

_PUBLISHED: dict[str, Any] = {
    "network": "resnet18", "projection": 128, "hidden": 512, "momentum": 0.996, "batch_size": 256, "warm_up_epochs": 10,
    "optimizer": "lars", "lr": 0.2, "weight_decay": 1.5e-6,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "channels": 1, "image_size": 8, "classes": 10, "network": "cnn", "projection": 64, "hidden": 256, "momentum": 0.95,
        "batch_size": 64, "epochs": 25, "warm_up_epochs": 2, "optimizer": "adamw", "lr": 3e-3, "weight_decay": 1e-4,
    },
    "imagenet100": {"channels": 3, "image_size": 224, "classes": 100, "epochs": 200, **_PUBLISHED},
    "cifar10": {"channels": 3, "image_size": 32, "classes": 10, "epochs": 200, **_PUBLISHED},
    "stl10": {"channels": 3, "image_size": 96, "classes": 10, "epochs": 200, **_PUBLISHED},
}  # fmt: skip
"""Digits, and the configuration of TSPipe's benchmark (Lim et al. 2022) on its three data sets; its epochs are not published."""


@dataclass(frozen=True)
class Byol(TwoViews):
    """Learn features of images from two views of each, without labels (Grill et al. 2020).

    What is not given is the preset's, shown by --print_config.

    Args:
        preset: form of the data, sizes and rates: digits, or TSPipe's configuration for imagenet100, cifar10 and stl10
        network: the encoder: a plain CNN (see width and depth), or a ResNet
        width: channels in the first half of the cnn; the second half has twice as many
        depth: convolutions of the cnn after its first one
        dropout: fraction of channels that the student's cnn drops
    """

    name: ClassVar[str] = "byol"

    preset: Literal["digits", "imagenet100", "cifar10", "stl10"] = "digits"
    network: Literal["cnn", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = None  # type: ignore[assignment]
    width: int = 16
    depth: int = 3

    def __post_init__(self) -> None:
        """Raise `ConfigError` with everything that cannot be."""
        filled(self, PRESETS[self.preset])
        lacks = self.dropout and self.network != "cnn"
        self.check(
            {"width": 1, "depth": 2, "projection": 1, "hidden": 1}, fractions=("sgd_momentum",),
            more=[f"dropout is {self.dropout}; a {self.network} has none"] if lacks else (),
        )  # fmt: skip

    def form(self) -> tuple[int, int]:
        return PRESETS[self.preset]["channels"], PRESETS[self.preset]["classes"]

    def task(self, images: Images, seed: int, steps_per_epoch: int) -> Momentum:
        """Build a fresh task: teacher and student of one form, and the student's predictor."""
        encoder, features = self._encoder(images, derive(seed, "student"))
        teacher, student = self.pair(encoder, seed, (features, self.hidden, self.projection))
        momentum = rising(self.momentum, self.epochs * steps_per_epoch)
        return Momentum(teacher, student, byol, momentum=momentum, views=2)

    def _encoder(self, images: Images, seed: int) -> tuple[nn.Module, int]:
        """Build the encoder, from images to features (rows, dim), and give dim too."""
        if self.network == "cnn":
            return seeded(seed, lambda: cnn(images.channels, self.width, self.depth, self.dropout)), self.width * 2
        resnet: Any = network(RESNETS[self.network], images.channels, images.size, 0, seed=seed, cuts="residual")
        return resnet, resnet.num_features


class Pooled(nn.Module):
    """The mean over the image of what another module gives: (rows, in, h, w) -> (rows, out)."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x).mean((2, 3))  # type: ignore[no-any-return]


def cnn(channels: int, width: int, depth: int, dropout: float) -> nn.Sequential:
    """Build a first convolution and `depth` more; the middle one halves the image, and from it on the width is double."""
    *blocks, last = convolutions(channels, width, depth, dropout)
    return nn.Sequential(*blocks, Pooled(last))
