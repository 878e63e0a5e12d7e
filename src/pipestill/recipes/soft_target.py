"""Soft-target distillation of image classifiers: a CNN on scikit-learn's digits, or ViT-L -> ResNet-152 on ImageNet."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pipestill import lr_schedules
from pipestill.errors import nearest
from pipestill.losses import SoftTarget as SoftTargetLoss, accuracy, cross_entropy
from pipestill.model.families.load import LIBRARIES, load_model
from pipestill.model.seeding import derive, seeded
from pipestill.recipes.datasets import digits
from pipestill.recipes.distillation import DistillationWorkload
from pipestill.recipes.image_recipe import ImageRecipe
from pipestill.recipes.images import Images
from pipestill.recipes.networks import RESNETS, network
from pipestill.recipes.recipe import filled
from pipestill.recipes.training import OPTIMIZERS, Training
from pipestill.recipes.vit import VIT_B, VIT_L, VIT_S, vit

CLASSES = 10
VITS = {"vit-s": VIT_S, "vit-b": VIT_B, "vit-l": VIT_L}
CNN = "cnn"
MODELS = (CNN, *VITS, *RESNETS)
"""Names of models that are here; others are named timm:NAME or torchvision:NAME."""


@dataclass(frozen=True)
class Data:
    """Form of a preset's images, its models, and how they are trained."""

    image_size: int
    num_classes: int
    teacher_model: str
    student_model: str
    weight: float
    batch_size: int
    epochs: int
    teacher_epochs: int
    teacher_lr: float
    schedule: str
    nesterov: bool
    augment: bool


_PUBLISHED = Data(
    224, 1000, "vit-l", "resnet152", weight=0.1, batch_size=16, epochs=200, teacher_epochs=300, teacher_lr=0.01,
    schedule="steps", nesterov=True, augment=True,
)  # fmt: skip
PRESETS = {
    "digits": Data(
        8, CLASSES, CNN, CNN, weight=1.0, batch_size=64, epochs=10, teacher_epochs=12, teacher_lr=0.05, schedule="cosine",
        nesterov=False, augment=False,
    ),
    "imagenet100": dataclasses.replace(_PUBLISHED, num_classes=100),
    "imagenet": _PUBLISHED,
}  # fmt: skip
"""Those of ImageNet are TSPipe's (Lim et al., ICML 2022); how its teacher was trained is not published."""

_CNN_SIZES = {"teacher_width": 32, "teacher_depth": 4, "student_width": 3, "student_depth": 3}


@dataclass(frozen=True)
class SoftTarget(ImageRecipe):
    """Distil an image classifier into another by its softened logits.

    What is not given is the preset's, shown by --print_config.

    Args:
        preset: form of the data, models and how they are trained: digits, or TSPipe's benchmark on ImageNet or on a list of 100
            of its classes
        classes: a file with the name of a folder of images in each line: only these classes are read, in this order
        teacher_model: the teacher: cnn, vit-s, vit-b, vit-l, resnet18, resnet34, resnet50, resnet101 or resnet152, or a name from
            timm or torchvision, such as timm:vit_large_patch16_224 (with random weights: nothing is downloaded)
        student_model: the student, by a name as for teacher_model
        teacher_width: channels of the first convolution of the teacher's cnn or of the first stage of its resnet, or width of its
            vit (default: 32 for a cnn, else the model's own)
        teacher_depth: convolutions of the teacher's cnn after its first one, most residual blocks in each stage of its resnet, or
            layers of its vit (default: 4 for a cnn, else the model's own)
        student_width: channels of the first convolution of the student's cnn or of the first stage of its resnet, or width of its
            vit (default: 3 for a cnn, else the model's own)
        student_depth: convolutions of the student's cnn after its first one, most residual blocks in each stage of its resnet, or
            layers of its vit (default: 3 for a cnn, else the model's own)
        dropout: fraction of channels or units that the student's cnn or vit drops while it trains
        temperature: temperature T that softens the logits of both models
        weight: weight of the soft-target term beside the cross entropy
        epochs: passes over the data for the student, with and without a teacher
        teacher_epochs: passes over the data for the teacher; with 0, and without --teacher, its weights stay random
        optimizer: optimizer of both models
        lr: learning rate of the student at the start
        teacher_lr: learning rate of the teacher at the start
        schedule: learning rates fall along a cosine, or in steps: to a tenth at half and again at three quarters of the epochs
        sgd_momentum: momentum of SGD itself
        nesterov: let SGD's momentum be Nesterov's
        weight_decay: L2 penalty (SGD) or decoupled weight decay (AdamW)
        augment: train on images that are shifted and mirrored at random, and on random parts of those from folders
    """

    name: ClassVar[str] = "soft-target"
    page: ClassVar[str] = "docs/published.md"

    preset: Literal["digits", "imagenet100", "imagenet"] = "digits"
    classes: str | None = None
    teacher_model: str = None  # type: ignore[assignment]
    student_model: str = None  # type: ignore[assignment]
    teacher_width: int | None = None
    teacher_depth: int | None = None
    student_width: int | None = None
    student_depth: int | None = None
    dropout: float = 0.0
    temperature: float = 4.0
    weight: float = None  # type: ignore[assignment]
    teacher_epochs: int = None  # type: ignore[assignment]
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    teacher_lr: float = None  # type: ignore[assignment]
    schedule: Literal["cosine", "steps"] = None  # type: ignore[assignment]
    sgd_momentum: float = 0.9
    nesterov: bool = None  # type: ignore[assignment]
    weight_decay: float = 1e-4
    augment: bool = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Raise `ConfigError` with everything that cannot be."""
        filled(self, vars(PRESETS[self.preset]))
        for name, size in _CNN_SIZES.items():
            if getattr(self, name) is None and getattr(self, f"{name.partition('_')[0]}_model") == CNN:
                object.__setattr__(self, name, size)
        least = {
            "teacher_width": 1, "student_width": 1, "batch_size": 1, "teacher_epochs": 0,
            "teacher_depth": 2 if self.teacher_model == CNN else 1, "student_depth": 2 if self.student_model == CNN else 1,
        }  # fmt: skip
        self.check(least, fractions=("dropout",), more=self._problems())

    def _problems(self) -> list[str]:
        problems = []
        for role in ("teacher", "student"):
            model = getattr(self, f"{role}_model")
            foreign = model.partition(":")[0] in LIBRARIES and ":" in model
            if model not in MODELS and not foreign:
                libraries = " or ".join(f"{library}:NAME" for library in LIBRARIES)
                problems.append(f"no {role}_model '{model}'{nearest(model, MODELS)}; there are {', '.join(MODELS)}, {libraries}")
            if foreign:
                given = [f"{role}_{size}" for size in ("width", "depth") if getattr(self, f"{role}_{size}") is not None]
                problems += [f"{name} is for models that are here, and '{model}' is not; leave it out" for name in given]
        if self.dropout and self.student_model != CNN and self.student_model not in VITS:
            problems.append(f"dropout is for a cnn or a vit, and the student_model is '{self.student_model}'; leave it out")
        return problems

    def workload(self, seed: int, num_samples: int | None = None) -> DistillationWorkload:
        """Build models, data and trainings. Raises `DataError` for data that is missing or broken."""
        if self.preset == "digits" and self.data is None and self.classes is None:
            train, test = digits(seed)
            if num_samples is not None:
                train = TensorDataset(*train[:num_samples])
            loaders = DataLoader(train, batch_size=self.batch_size, shuffle=True), DataLoader(test, batch_size=256)
            channels, size, num_classes = 1, 8, CLASSES
        else:
            images = self.images(seed)
            channels, size, num_classes = images.channels, images.size, images.num_classes
            loaders = images.loaders(self.batch_size, augment=self.augment, num_samples=num_samples, workers=self.workers)
        untrained = "random weights, as teacher_epochs is 0: the student is taught noise"
        return DistillationWorkload(
            build_teacher=lambda: self.model("teacher", channels, size, num_classes, seed),
            build_student=lambda: self.model("student", channels, size, num_classes, seed),
            loss=SoftTargetLoss(self.temperature, self.weight),
            supervised_loss=cross_entropy,
            metrics={"accuracy": accuracy},
            train_loader=loaders[0],
            validation_loader=loaders[1],
            teacher_training=self._training(self.teacher_epochs, self.teacher_lr),
            student_training=self._training(self.epochs, self.lr),
            teacher_origin=None if self.teacher_epochs else untrained,
        )

    def form(self) -> tuple[int, int]:
        return 1 if self.preset == "digits" else 3, PRESETS[self.preset].num_classes

    def images(self, seed: int) -> Images:
        """Open the images that the models are trained on."""
        return self.read_images(seed, augment=self.augment, only=self.classes)

    def model(self, role: str, channels: int, size: int, num_classes: int, seed: int) -> nn.Module:
        """Build teacher or student for images (rows, channels, size, size) -> logits (rows, num_classes)."""
        name, width, depth = (getattr(self, f"{role}_{what}") for what in ("model", "width", "depth"))
        seed, dropout = derive(seed, role), self.dropout if role == "student" else 0.0
        if name == CNN:
            return cnn(width, depth, dropout, seed, channels, num_classes)
        if name in VITS:
            shape = VITS[name]
            shape = dataclasses.replace(
                shape, width=width or shape.width, depth=depth or shape.depth,
                heads=shape.heads if width is None else max(1, width * shape.heads // shape.width),
                patch=shape.patch if size % shape.patch == 0 else size // 4,
            )  # fmt: skip
            return vit(shape, channels, size, num_classes, dropout=dropout, seed=seed)
        if name in RESNETS:
            net = RESNETS[name]
            widths = net.widths if width is None else tuple(width * 2**i for i in range(len(net.widths)))
            depths = net.depths if depth is None else tuple(min(depth, most) for most in net.depths)
            net = dataclasses.replace(net, widths=widths, depths=depths)
            return network(net, channels, size, num_classes, seed=seed, cuts="residual")
        return load_model(name, num_classes, seed)

    def _training(self, epochs: int, lr: float) -> Training:
        options: dict[str, Any] = {"weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            options["momentum"] = self.sgd_momentum
            if self.nesterov:
                options["nesterov"] = True
        return Training(epochs, OPTIMIZERS[self.optimizer], lr, options, SCHEDULES[self.schedule])


def tenths(total_steps: int) -> lr_schedules.LrSchedule:
    """The factor 1 up to half of all steps, then a tenth, and a hundredth from three quarters on."""
    return lr_schedules.steps((-(-total_steps // 2), -(-3 * total_steps // 4)))


SCHEDULES = {"cosine": lr_schedules.cosine, "steps": tenths}


class Convolution(nn.Module):
    """3x3 convolution, batch norm, ReLU and dropout: (rows, in, h, w) -> (rows, out, h / stride, w / stride)."""

    def __init__(self, channels_in: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.relu(self.norm(self.convolution(x))))  # type: ignore[no-any-return]


class Head(nn.Module):
    """Average over the image, then a linear layer: (rows, channels, h, w) -> (rows, classes)."""

    def __init__(self, channels: int, classes: int = CLASSES) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def cnn(width: int, depth: int, dropout: float, seed: int, channels_in: int = 1, classes: int = CLASSES) -> nn.Sequential:
    """Build a first convolution, `depth` more (the middle one halves the image and doubles the channels) and a head."""
    return seeded(seed, lambda: nn.Sequential(*convolutions(channels_in, width, depth, dropout), Head(2 * width, classes)))


def convolutions(channels: int, width: int, depth: int, dropout: float) -> list[nn.Module]:
    """Build a first convolution and `depth` more: the middle one halves the image, and from it on the width is double."""
    layers: list[nn.Module] = [Convolution(channels, width, 1, dropout)]
    for i in range(depth):
        before, after = (width * (2 if j >= depth // 2 else 1) for j in (i - 1, i))
        layers.append(Convolution(before, after, 2 if i == depth // 2 else 1, dropout))
    return layers
