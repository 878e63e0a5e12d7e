"""MoCo v3: Vision Transformers that tell each image's two views from all others, with a momentum teacher and no labels."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pipestill.losses import InfoNCE
from pipestill.model.seeding import derive
from pipestill.model.tasks import Momentum
from pipestill.recipes.images import Images
from pipestill.recipes.recipe import filled
from pipestill.recipes.self_supervised import TwoViews, patch_problems, rising
from pipestill.recipes.vit import VIT_B, VIT_L, VIT_S_MOCO, ViTShape, vit

MODELS = {"vit-t": ViTShape(48, 3, 3, 2, 2.0), "vit-s": VIT_S_MOCO, "vit-b": VIT_B, "vit-l": VIT_L}
"""A tiny one with patches of 2 x 2 pixels for small images, and those of the paper with patches of 16 x 16."""

PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "channels": 1, "image_size": 8, "classes": 10, "model": "vit-t", "projection": 32, "hidden": 128, "momentum": 0.97,
        "batch_size": 64, "epochs": 30, "warm_up_epochs": 3, "optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.1,
    },
    "imagenet": {
        "channels": 3, "image_size": 224, "classes": 1000, "model": "vit-s", "projection": 256, "hidden": 4096,
        "momentum": 0.99, "batch_size": 128, "epochs": 300, "warm_up_epochs": 40, "optimizer": "lars", "weight_decay": 0.1,
    },
}  # fmt: skip
"""Digits, and the configuration of TSPipe's benchmark (Lim et al. 2022); its epochs are those of MoCo v3."""

_LR_OF_256 = 1.5e-4  # of published configurations, for 256 samples of an update


@dataclass(frozen=True)
class MocoV3(TwoViews):
    """Learn features of images without labels, from two views of each and all other images of the batch.

    The method is that of Chen et al. 2021. The projection of patches stays as it is initialised, and positions are fixed
    sines. What is not given is the preset's, shown by --print_config.

    Args:
        preset: form of the data, sizes and rates: digits, or TSPipe's configuration for imagenet
        model: the encoder, a Vision Transformer: vit-t with patches of 2 x 2 pixels, the others with patches of 16 x 16
        depth: layers of the encoder (default: as many as the model has)
        temperature: temperature that divides the cosines between views
        lr: highest learning rate; after the warm-up it falls along a cosine (default for imagenet: 1.5e-4 for each 256 samples of
            a batch)
    """

    name: ClassVar[str] = "moco-v3"

    preset: Literal["digits", "imagenet"] = "digits"
    model: Literal["vit-t", "vit-s", "vit-b", "vit-l"] = None  # type: ignore[assignment]
    depth: int = None  # type: ignore[assignment]
    temperature: float = 0.2

    def __post_init__(self) -> None:
        """Raise `ConfigError` with everything that cannot be."""
        filled(self, PRESETS[self.preset])
        filled(self, {"depth": MODELS[self.model].depth, "lr": _LR_OF_256 * self.batch_size / 256})
        self.check(
            {"depth": 1, "projection": 1, "hidden": 1}, fractions=("sgd_momentum",), above_0=("temperature",),
            more=patch_problems(self, ("image_size",), MODELS[self.model].patch),
        )  # fmt: skip

    def form(self) -> tuple[int, int]:
        return PRESETS[self.preset]["channels"], PRESETS[self.preset]["classes"]

    def task(self, images: Images, seed: int, steps_per_epoch: int) -> Momentum:
        """Build a fresh task: teacher and student of one form, and the student's predictor."""
        shape = dataclasses.replace(MODELS[self.model], depth=self.depth)
        encoder = vit(
            shape, images.channels, images.size, None, positions="sincos", freeze_patches=True, dropout=self.dropout,
            seed=derive(seed, "student"),
        )  # fmt: skip
        sizes = (shape.width, self.hidden, self.hidden, self.projection)
        teacher, student = self.pair(encoder, seed, sizes, last_norm=True)
        momentum = rising(self.momentum, self.epochs * steps_per_epoch)
        return Momentum(teacher, student, InfoNCE(self.temperature), momentum=momentum, views=2, batch_loss=True)
