"""What recipes have in common that train image classifiers block by block: options, data, and trainings of whole models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch

from pipestill import losses
from pipestill.lr_schedules import cosine
from pipestill.recipes.image_recipe import ImageRecipe
from pipestill.recipes.images import Images
from pipestill.recipes.training import Training

BLOCK_LOSSES: dict[str, losses.BlockLoss] = {
    "mse": losses.mse, "normalised": losses.normalised_mse, "cosine": losses.cosine_distance,
}  # fmt: skip


@dataclass(frozen=True)
class BlockwiseRecipe(ImageRecipe):
    """Options of recipes whose student is trained block by block and then, unless fine_tuning_epochs is 0, as a whole.

    Args:
        epochs: passes over the data for the student's blocks
        teacher_epochs: passes over the data for the teacher
        fine_tuning_epochs: passes over the data end to end, after the blocks; 0 for none. The student without a teacher is
            trained for epochs and fine_tuning_epochs together
        block_loss: loss of each block but the last: mean squared error, mean squared error relative to the teacher's outputs, or
            1 - cosine
        temperature: temperature T that softens the logits of both models in the loss of the last block
        lr: learning rate of the blocks at the start; each learning rate falls along a cosine
        teacher_lr: learning rate of the teacher, and of the student without a teacher, at the start
        fine_tuning_lr: learning rate of the fine-tuning at the start
        sgd_momentum: momentum of SGD itself
        augment: train on images that are shifted and mirrored at random, and on random parts of those from folders
    """

    run_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"strategy": "balanced", "microbatches": 2})

    teacher_epochs: int = None  # type: ignore[assignment]
    fine_tuning_epochs: int = None  # type: ignore[assignment]
    block_loss: Literal["mse", "normalised", "cosine"] = "mse"
    temperature: float = 1.0
    lr: float = None  # type: ignore[assignment]
    teacher_lr: float = 0.05
    fine_tuning_lr: float = 0.02
    sgd_momentum: float = 0.9
    augment: bool = None  # type: ignore[assignment]

    def check(self, least: Mapping[str, float], **others: Any) -> None:
        """Raise `ConfigError` with everything that is wrong with the options; see `ImageRecipe.check`."""
        others["fractions"] = ("sgd_momentum", *others.get("fractions", ()))
        others["above_0"] = ("temperature", "lr", "teacher_lr", "fine_tuning_lr", *others.get("above_0", ()))
        super().check({"teacher_epochs": 1, "fine_tuning_epochs": 0, **least}, **others)

    def images(self, seed: int) -> Images:
        """Open the images that the models are trained on."""
        return self.read_images(seed, augment=self.augment)

    def of_whole_models(self, fine_tuning_temperature: float) -> dict[str, Any]:
        """Make the arguments of `BlockwiseWorkload` for the trainings of whole models, all by SGD."""
        options = {"momentum": self.sgd_momentum, "weight_decay": self.weight_decay}

        def training(epochs: int, lr: float) -> Training:
            return Training(epochs, torch.optim.SGD, lr, options, cosine)

        tuning = training(self.fine_tuning_epochs, self.fine_tuning_lr)
        return {
            "supervised_loss": losses.cross_entropy,
            "metrics": {"accuracy": losses.accuracy},
            "teacher_training": training(self.teacher_epochs, self.teacher_lr),
            "alone_training": training(self.epochs + self.fine_tuning_epochs, self.teacher_lr),
            "fine_tuning": tuning if self.fine_tuning_epochs else None,
            "fine_tuning_loss": losses.SoftTarget(fine_tuning_temperature, weight=1.0),
        }


def listed(numbers: Sequence[int]) -> str:
    """Write numbers as the command line takes them."""
    return ",".join(map(str, numbers)) or "empty"
