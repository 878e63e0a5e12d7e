"""Block-by-block compression of a CNN: a VGG or ResNet teacher, a student of depthwise-separable convolutions."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from pipestill import losses
from pipestill.lr_schedules import cosine
from pipestill.model.blockwise.task import Blockwise
from pipestill.model.seeding import derive
from pipestill.recipes.blockwise import BlockwiseWorkload
from pipestill.recipes.blockwise_recipe import BLOCK_LOSSES, BlockwiseRecipe, listed
from pipestill.recipes.networks import Shape, network
from pipestill.recipes.recipe import filled
from pipestill.recipes.run_options import Numbers
from pipestill.recipes.training import OPTIMIZERS, Training


@dataclass(frozen=True)
class Data:
    """Form of a preset's images, and how long to train on them."""

    channels: int
    image_size: int
    num_classes: int
    batch_size: int
    teacher_epochs: int
    epochs: int
    fine_tuning_epochs: int
    augment: bool


DATA = {
    "digits": Data(1, 8, 10, 32, 8, 15, 5, augment=False),
    "cifar10": Data(3, 32, 10, 256, 150, 60, 20, augment=True),
    "imagenet": Data(3, 224, 1000, 256, 90, 30, 10, augment=True),
}
"""Presets: batches of 256 for CIFAR-10 and ImageNet are Pipe-BD's (Jang et al., DATE 2023); epochs are usual ones."""

_VGG16, _RESNET18 = (64, 128, 256, 512, 512), (64, 128, 256, 512)
SHAPES = {  # teacher, student
    ("digits", "vgg"): (Shape("vgg", (16, 24, 32, 48, 64), (1, 2, 2, 2, 2)), (1, 2, 2, 2, 2)),
    ("digits", "resnet"): (Shape("resnet", (16, 24, 32, 48), (1, 1, 1, 1)), (1, 1, 1, 1)),
    ("cifar10", "vgg"): (Shape("vgg", _VGG16, (2, 2, 3, 3, 3)), (2, 2, 3, 3, 3)),
    ("cifar10", "resnet"): (Shape("resnet", _RESNET18, (2, 2, 2, 2)), (2, 2, 2, 2)),
    ("imagenet", "vgg"): (Shape("vgg", _VGG16, (2, 2, 3, 3, 3), (4096, 4096)), (2, 2, 3, 3, 3)),
    ("imagenet", "resnet"): (Shape("resnet", _RESNET18, (2, 2, 2, 2)), (2, 2, 2, 2)),
}
"""Teachers of each preset, and the depths of their students: VGG-16 and ResNet-18 but for the digits."""


@dataclass(frozen=True)
class Compress(BlockwiseRecipe):
    """Replace a CNN's convolutions by depthwise-separable ones, block by block.

    Each block of the student is trained alone to give what the teacher's block gives; then, unless fine_tuning_epochs is 0, the
    whole student is distilled end to end. What is not given is the preset's, shown by --print_config.

    Args:
        preset: form of the data, sizes and epochs: digits, or Pipe-BD's configurations of VGG-16 for cifar10 and imagenet
        weight_decay: L2 penalty (SGD) or decoupled weight decay (AdamW)
        network: family of the teacher and the student
        teacher_norm: put batch norm behind the convolutions of a VGG teacher
        widths: channels of each stage, such as 64,128,256,512,512
        depths: convolutions (vgg) or residual blocks of two convolutions (resnet) in each stage of the teacher
        student_depths: convolutions (vgg) or residual blocks of two convolutions (resnet) in each stage of the student
        hidden: units in the hidden layers of a VGG teacher's classifier, [] for none; the student's classifier has none
        fine_tuning_temperature: temperature T that softens the logits of both models in the fine-tuning, whose loss has softened
            logits and labels
        optimizer: optimizer of each block; trainings end to end have sgd always
    """

    name: ClassVar[str] = "compress"
    page: ClassVar[str] = "docs/blockwise.md"

    preset: Literal["digits", "cifar10", "imagenet"] = "digits"
    lr: float = 0.02
    weight_decay: float = 1e-4
    network: Literal["vgg", "resnet"] = "vgg"
    teacher_norm: bool = True
    widths: Numbers = None  # type: ignore[assignment]
    depths: Numbers = None  # type: ignore[assignment]
    student_depths: Numbers = None  # type: ignore[assignment]
    hidden: Numbers = None  # type: ignore[assignment]
    fine_tuning_temperature: float = 4.0
    optimizer: Literal["sgd", "adamw"] = "adamw"

    def __post_init__(self) -> None:
        """Raise `ConfigError` with everything that cannot be."""
        teacher, student_depths = SHAPES[self.preset, self.network]
        filled(self, {**vars(DATA[self.preset]), **vars(teacher), "student_depths": student_depths})
        self.check({}, above_0=("fine_tuning_temperature",), more=self._problems())

    def _problems(self) -> list[str]:
        problems = []
        for name in ("widths", "depths", "student_depths", "hidden"):
            if any(number < 1 for number in getattr(self, name)):
                problems.append(f"{name} is {listed(getattr(self, name))}; expected numbers of at least 1")
        stages = len(self.widths)
        if not stages:
            problems.append("widths is empty; expected the channels of at least one stage")
        problems += [
            f"{name} is {listed(getattr(self, name))}, of {len(getattr(self, name))} stages; widths has {stages}"
            for name in ("depths", "student_depths")
            if len(getattr(self, name)) != stages
        ]
        if self.network == "resnet" and self.hidden:
            problems.append("hidden is of the classifier of a vgg; a resnet's has none")
        if self.network == "resnet" and not self.teacher_norm:
            problems.append("teacher_norm is false; a resnet always has batch norm")
        return problems

    def form(self) -> tuple[int, int]:
        return DATA[self.preset].channels, DATA[self.preset].num_classes

    def workload(self, seed: int, num_samples: int | None = None) -> BlockwiseWorkload:
        """Build task, data and trainings. Raises `DataError` for data that is missing or broken."""
        images = self.images(seed)
        train, test = images.loaders(self.batch_size, augment=self.augment, num_samples=num_samples, workers=self.workers)
        options = {"weight_decay": self.weight_decay} | ({"momentum": self.sgd_momentum} if self.optimizer == "sgd" else {})
        return BlockwiseWorkload(
            build=partial(self.task, images.channels, images.size, images.num_classes, seed),
            train_loader=train,
            validation_loader=test,
            student_training=Training(self.epochs, OPTIMIZERS[self.optimizer], self.lr, options, cosine),
            **self.of_whole_models(self.fine_tuning_temperature),
        )

    def task(self, channels: int, size: int, num_classes: int, seed: int) -> Blockwise:
        """Build teacher and student for images (rows, channels, size, size)."""
        teacher = Shape(self.network, self.widths, self.depths, self.hidden)
        student = Shape(self.network, self.widths, self.student_depths)
        form = (channels, size, num_classes)
        return Blockwise(
            network(teacher, *form, norm=self.teacher_norm, seed=derive(seed, "teacher")),
            network(student, *form, separable=True, seed=derive(seed, "student")),
            loss=BLOCK_LOSSES[self.block_loss],
            last_loss=losses.SoftCrossEntropy(self.temperature),
        )
