"""DINO: many small views of each image that agree with what a momentum teacher makes of two large ones, no labels."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipestill import losses
from pipestill.lr_schedules import LrSchedule, cosine
from pipestill.model.seeding import derive, seeded
from pipestill.model.tasks import Momentum
from pipestill.recipes.augment import Photographs, Scans, View
from pipestill.recipes.byol import cnn
from pipestill.recipes.images import Images
from pipestill.recipes.recipe import filled
from pipestill.recipes.self_supervised import Chain, SelfSupervised, patch_problems, rising
from pipestill.recipes.training import OPTIMIZERS, Training, without_decay
from pipestill.recipes.vit import VIT_B, VIT_S, ViTShape, vit

MODELS = {"vit-t": ViTShape(48, 3, 3, 2, 2.0), "vit-s": VIT_S, "vit-b": VIT_B}
"""Beside a plain CNN: a tiny one with patches of 2 x 2 pixels for small images, and those of the paper with 16 x 16."""

PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "channels": 1, "image_size": 8, "classes": 10, "model": "cnn", "depth": 3, "local_views": 4, "local_size": 6,
        "hidden": 128, "bottleneck": 32, "prototypes": 128, "head_norm": True, "temperature": 0.05, "temperature_epochs": 10,
        "momentum": 0.95, "batch_size": 64, "epochs": 25, "warm_up_epochs": 2, "lr": 3e-3,
    },
    "imagenet": {
        "channels": 3, "image_size": 224, "classes": 1000, "model": "vit-s", "local_views": 8, "local_size": 96,
        "hidden": 2048, "bottleneck": 256, "prototypes": 65_536, "head_norm": False, "temperature": 0.07,
        "temperature_epochs": 30, "momentum": 0.996, "batch_size": 1024, "epochs": 100, "warm_up_epochs": 10,
    },
}  # fmt: skip
"""Digits, and the configuration of the paper's ViT-S for ImageNet."""

_LR_OF_256 = 5e-4  # of published configurations, for 256 samples of an update


@dataclass(frozen=True)
class Dino(SelfSupervised):
    """Learn features of images by making small views of them agree with large ones, without labels (Caron et al. 2021).

    The teacher sees the two large views of each image only. What is not given is the preset's, shown by --print_config.

    Args:
        preset: form of the data, sizes and rates: digits, or those of the paper for imagenet
        image_size: pixels of the two large views, in height and in width
        weight_decay: decoupled decay of weights at the start; biases and norms have none
        lr: highest learning rate of AdamW; after the warm-up it falls along a cosine (default for imagenet: 5e-4 for each 256
            samples of a batch)
        dropout: fraction of channels (cnn) or of values (transformer) that the student drops
        local_size: pixels of the small views, in height and in width
        local_views: number of small views of each image
        model: the encoder: a plain CNN (see width and depth), or a Vision Transformer: vit-t with patches of 2 x 2 pixels, the
            others with patches of 16 x 16
        width: channels in the first half of the cnn; the second half has twice as many
        depth: convolutions of a cnn after its first one, or layers of a transformer (default for a transformer: as many as the
            model has)
        hidden: units in the hidden layers of the head
        bottleneck: units of the head before its last layer
        prototypes: outputs of the head
        head_norm: put batch norm into the hidden layers of the head
        student_temperature: temperature that divides the student's outputs
        warm_up_temperature: temperature that divides the teacher's outputs at the start
        temperature: temperature that divides the teacher's outputs from temperature_epochs on; it rises evenly until then
        temperature_epochs: epochs in which the teacher's temperature rises
        center_momentum: fraction of the teacher's center that each batch keeps
        final_weight_decay: decoupled decay of weights at the end, to which it rises along a cosine
    """

    name: ClassVar[str] = "dino"

    preset: Literal["digits", "imagenet"] = "digits"
    weight_decay: float = 0.04
    local_size: int = None  # type: ignore[assignment]
    local_views: int = None  # type: ignore[assignment]
    model: Literal["cnn", "vit-t", "vit-s", "vit-b"] = None  # type: ignore[assignment]
    width: int = 24
    depth: int = None  # type: ignore[assignment]
    hidden: int = None  # type: ignore[assignment]
    bottleneck: int = None  # type: ignore[assignment]
    prototypes: int = None  # type: ignore[assignment]
    head_norm: bool = None  # type: ignore[assignment]
    student_temperature: float = 0.1
    warm_up_temperature: float = 0.04
    temperature: float = None  # type: ignore[assignment]
    temperature_epochs: int = None  # type: ignore[assignment]
    center_momentum: float = 0.9
    final_weight_decay: float = 0.4

    def __post_init__(self) -> None:
        """Raise `ConfigError` with everything that cannot be."""
        shape = MODELS.get(self.model or PRESETS[self.preset]["model"])
        filled(self, {"depth": shape.depth} if shape else {})
        filled(self, PRESETS[self.preset])
        filled(self, {"depth": 3, "lr": _LR_OF_256 * self.batch_size / 256})
        problems = patch_problems(self, ("image_size", "local_size"), shape.patch if shape else 1)
        if self.final_weight_decay < 0 or (self.final_weight_decay and not self.weight_decay):
            problems.append(f"final_weight_decay is {self.final_weight_decay}; expected 0 or more, and 0 where weight_decay is")
        ones = ("local_size", "width", "depth", "hidden", "bottleneck")
        self.check(
            {**dict.fromkeys(ones, 1), "local_views": 0, "prototypes": 2, "temperature_epochs": 0},
            fractions=("center_momentum",), above_0=("student_temperature", "warm_up_temperature", "temperature"), more=problems,
        )  # fmt: skip

    def form(self) -> tuple[int, int]:
        return PRESETS[self.preset]["channels"], PRESETS[self.preset]["classes"]

    def training(self, schedule: Callable[[int], LrSchedule]) -> Training:
        """Say how the student is trained: by AdamW, with a weight decay that grows."""
        grown = self.final_weight_decay / self.weight_decay if self.weight_decay else 1.0
        options = {"weight_decay": self.weight_decay}
        return Training(self.epochs, OPTIMIZERS["adamw"], self.lr, options, schedule, without_decay, partial(cosine, end=grown))

    def views(self, images: Images) -> list[View]:
        """Make two large views and several small ones."""
        if images.channels == 1:
            large, small = Scans(images.size), Scans(self.local_size, window=(0.6, 0.8), moved=0.3)
            return [large, large, *(small for _ in range(self.local_views))]
        large_share, small_share = (0.4, 1.0), (0.05, 0.4)
        return [
            Photographs(images.size, large_share, blurred=1.0),
            Photographs(images.size, large_share, blurred=0.1, solarised=0.2),
            *(Photographs(self.local_size, small_share, blurred=0.5) for _ in range(self.local_views)),
        ]

    def task(self, images: Images, seed: int, steps_per_epoch: int) -> Momentum:
        """Build a fresh task: teacher and student of one form."""
        encoder, features = self._encoder(images, derive(seed, "student"))
        sizes = (features, self.hidden, self.bottleneck, self.prototypes)
        head = seeded(derive(seed, "head"), lambda: Head(*sizes, norm=self.head_norm))
        loss = losses.Dino(
            self.prototypes, student_temperature=self.student_temperature, center_momentum=self.center_momentum,
            teacher_temperatures=(self.warm_up_temperature, self.temperature),
            warm_up_batches=self.temperature_epochs * steps_per_epoch,
        )  # fmt: skip
        return Momentum(
            Chain(encoder=copy.deepcopy(encoder), head=copy.deepcopy(head)), Chain(encoder=encoder, head=head), loss,
            momentum=rising(self.momentum, self.epochs * steps_per_epoch), views=2 + self.local_views, teacher_views=2,
            batch_loss=True,
        )  # fmt: skip

    def _encoder(self, images: Images, seed: int) -> tuple[nn.Module, int]:
        """Build the encoder, from images of any size to features (rows, dim), and give dim too."""
        if self.model == "cnn":
            return seeded(seed, lambda: cnn(images.channels, self.width, self.depth, self.dropout)), 2 * self.width
        shape = dataclasses.replace(MODELS[self.model], depth=self.depth)
        return vit(shape, images.channels, images.size, None, dropout=self.dropout, seed=seed), shape.width


class Head(nn.Module):
    """Two hidden layers, a bottleneck brought to norm 1, and cosines with prototypes: (rows, in) -> (rows, prototypes).

    The prototypes are a linear layer whose weights are brought to norm 1 as well, a row at a time. `norm`: batch norm in the
    hidden layers.
    """

    def __init__(self, size: int, hidden: int, bottleneck: int, prototypes: int, norm: bool) -> None:
        super().__init__()
        layers = list[nn.Module]()
        for before in (size, hidden):
            layers += [nn.Linear(before, hidden), *([nn.BatchNorm1d(hidden)] if norm else []), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.trunc_normal_(self.prototypes, std=0.02)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.layers(x), dim=-1), F.normalize(self.prototypes, dim=-1))
