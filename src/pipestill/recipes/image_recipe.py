"""What recipes have in common that learn from images: their data, and checks of their options."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pipestill.arguments import raise_problems
from pipestill.recipes.datasets import choose_images
from pipestill.recipes.images import Images


@dataclass(frozen=True)
class ImageRecipe(ABC):
    """Options of every recipe that learns from images.

    Args:
        preset: form of the data, sizes and rates
        data: a directory of CIFAR-10's python files, or of 'train' and 'val', each with one folder of images for each class; or
            noise, to measure speed (default for digits: those that ship inside scikit-learn)
        image_size: pixels to which images from folders are resized, in height and in width
        batch_size: samples of one update
        epochs: passes over the data for the student
        weight_decay: L2 penalty (SGD, LARS) or decoupled weight decay (AdamW)
        workers: processes that read images, beside those that train
    """

    page: ClassVar[str]
    """The page of the docs about the data."""

    # None stands for the preset's value, which replaces it at once.
    preset: str = "digits"
    data: str | None = None
    image_size: int = None  # type: ignore[assignment]
    batch_size: int = None  # type: ignore[assignment]
    epochs: int = None  # type: ignore[assignment]
    weight_decay: float = None  # type: ignore[assignment]
    workers: int = 0

    @abstractmethod
    def form(self) -> tuple[int, int]:
        """Channels of the preset's images, and the number of its classes."""

    def read_images(self, seed: int, *, augment: bool = False, only: str | None = None) -> Images:
        """Open the images that the models are trained on.

        Args:
            seed: draws which samples are to train on
            augment: take random parts of the images of folders
            only: a file with the names of the folders to read (default: all)
        """
        channels, classes = self.form()
        return choose_images(
            self.data, self.preset, (channels, self.image_size, classes), batch_size=self.batch_size, augment=augment, seed=seed,
            page=self.page, classes=only,
        )  # fmt: skip

    def check(
        self, least: Mapping[str, float], *, fractions: Sequence[str] = (), above_0: Sequence[str] = (), more: Sequence[str] = ()
    ) -> None:
        """Raise `ConfigError` with everything that is wrong with the options.

        Args:
            least: the smallest values of options, beside those that all such recipes have
            fractions: options from 0 to below 1
            above_0: options that have to be more than 0
            more: further problems
        """
        of_images = {"image_size": 8, "batch_size": 2, "epochs": 1, "workers": 0}
        problems = [*problems_of(self, {**of_images, **least}, fractions, above_0), *more]
        if self.weight_decay < 0:
            problems.append(f"weight_decay is {self.weight_decay}; expected 0 or more")
        if self.preset == "digits" and self.data is None and self.image_size != 8:
            problems.append(f"image_size is {self.image_size}; the digits are 8 x 8, so give --data, or leave it out")
        raise_problems(problems)


def problems_of(recipe: Any, least: Mapping[str, float], fractions: Sequence[str], above_0: Sequence[str]) -> list[str]:
    """Find what is wrong with options: those with a smallest value, numbers from 0 to below 1, and those above 0."""

    def wrong(names: Sequence[str] | Mapping[str, float], is_right: Any, expected: str) -> list[str]:
        given = {name: getattr(recipe, name) for name in names}
        return [
            f"{name} is {value}; expected {expected.format(*(least[name],) if name in least else ())}"
            for name, value in given.items()
            if value is not None and not is_right(name, value)
        ]

    return [
        *wrong(least, lambda name, value: value >= least[name], "at least {}"),
        *wrong(fractions, lambda name, value: 0.0 <= value < 1.0, "0 or more, and less than 1"),
        *wrong(above_0, lambda name, value: value > 0, "more than 0"),
    ]
