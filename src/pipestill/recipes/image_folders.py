"""Folders of images, one for each class, read with Pillow."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipestill.errors import DataError, nearest
from pipestill.recipes.images import Images, Sample
from pipestill.recipes.packages import needed

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_OPENED = 1_000  # images of a tree that are read before training: all of a smaller one, else the first of each class
_SHOWN = 5  # of what is wrong with a data set


def image_folders(path: Path, size: int, *, augment: bool, classes: Sequence[str] | None = None) -> Images:
    """Open `path`/train/CLASS/IMAGE and `path`/val/CLASS/IMAGE, read with Pillow as they are needed (ImageNet's layout).

    With `classes`, only these folders are read, numbered in that order. To train with `augment`, a random part of an image
    is taken (Szegedy et al. 2015, section 6), else the middle of it. Every image of a small tree is opened here; of a
    large one, one a class.
    """
    pillow()
    for half in ("train", "val"):
        if not (path / half).is_dir():
            raise DataError(f"'{path}' has no folder '{half}'; expected 'train' and 'val' with a folder for each class")
    there = sorted(entry.name for entry in (path / "train").iterdir() if entry.is_dir())
    problems = []
    if classes is not None:
        problems += [
            f"'{path / 'train'}' lacks the class '{name}' of the list{nearest(name, there)}"
            for name in classes
            if name not in there
        ]
        classes = [name for name in classes if name in there]
    else:
        classes = there
        unknown = [e.name for e in sorted((path / "val").iterdir()) if e.is_dir() and e.name not in classes]
        problems += [f"'{path / 'val'}' has a class '{name}' that 'train' lacks" for name in unknown]
    if not there:
        problems.append(f"'{path / 'train'}' has no folder; expected one for each class")
    halves = {
        half: [(file, label) for label, name in enumerate(classes) for file in _files(path / half / name, problems)]
        for half in ("train", "val")
    }
    if not problems:
        every = [*halves["train"], *halves["val"]]
        firsts = {(file.parent): file for file, _ in reversed(every)}
        opened = [file for file, _ in every] if len(every) <= _OPENED else sorted(firsts.values())
        problems = [problem for file in opened if (problem := _unreadable(file))]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError("; ".join(problems[:_SHOWN]) + more)
    train, test = (Folder(tuple(samples), size, augment and half == "train") for half, samples in halves.items())
    return Images(train, test, 3, size, len(classes))


def read_classes(file: str | Path) -> tuple[str, ...]:
    """Read the names of folders, the first word of each line; empty lines and what follows a # do not count.

    `DataError` for a list that cannot be read, is empty or names a class twice.
    """
    try:
        lines = Path(file).read_text().splitlines()
    except OSError as error:
        raise DataError(f"cannot read the list of classes '{file}': {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"the list of classes '{file}' is not text; expected the name of a folder in each line") from None
    names = [words[0] for line in lines if (words := line.partition("#")[0].split())]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"the list of classes '{file}' names {', '.join(twice[:_SHOWN])} more than once")
    if not names:
        raise DataError(f"the list of classes '{file}' is empty; expected the name of a folder in each line")
    return tuple(names)


def pillow() -> Any:
    """Import Pillow's module of images; `ConfigError` where it is missing."""
    return needed("PIL.Image", "folders of images are read with Pillow", "pillow")


def _files(folder: Path, problems: list[str]) -> list[Path]:
    if not folder.is_dir():
        problems.append(f"'{folder.parent}' lacks the class '{folder.name}' of 'train'")
        return []
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
    if not files:
        problems.append(f"'{folder}' holds no image ({', '.join(_SUFFIXES[:3])} and the like)")
    return files


def _unreadable(file: Path) -> str | None:
    try:
        with pillow().open(file) as image:
            image.load()
    except Exception as error:  # a broken image raises almost anything
        return f"cannot read image '{file}': {' '.join(str(error).split())}"
    return None


@dataclass(frozen=True)
class Folder(Dataset[Sample]):
    """Images in files, as (3, size, size) bytes with the number of their class."""

    samples: tuple[tuple[Path, int], ...]
    size: int
    random_part: bool

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        image = self._opened(index)
        width, height = image.size
        part = _random_part(width, height) if self.random_part else _middle(width, height, self.size)
        resized = image.resize((self.size, self.size), pillow().Resampling.BILINEAR, box=part)
        return _bytes(resized), self.samples[index][1]

    def whole(self, index: int) -> Sample:
        """Read an image as it lies in its file, (3, height, width) bytes."""
        return _bytes(self._opened(index)), self.samples[index][1]

    def _opened(self, index: int) -> Any:
        file, _ = self.samples[index]
        image_module = pillow()
        try:
            with image_module.open(file) as opened:
                return opened.convert("RGB")
        except Exception as error:  # as above
            raise DataError(f"cannot read image '{file}': {' '.join(str(error).split())}") from None


def _bytes(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _middle(width: int, height: int, size: int) -> tuple[float, float, float, float]:
    """Find the largest square in the middle, less a margin of an eighth where images are photographs of usual size."""
    side = min(width, height) * (0.875 if size > 64 else 1.0)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_part(width: int, height: int) -> tuple[float, float, float, float]:
    """Draw a part of an image: 8 % to all of its area, with sides between 3:4 and 4:3."""
    share, stretch, x, y = torch.rand(4).tolist()
    area = width * height * (0.08 + 0.92 * share)
    ratio = (4 / 3) ** (2 * stretch - 1)
    w, h = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
    left, top = x * (width - w), y * (height - h)
    return left, top, left + w, top + h
