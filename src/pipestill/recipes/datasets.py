"""Images to learn from: the embedded digits, CIFAR-10's own files, folders of images, and noise."""

import io
import pickle
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from pipestill.errors import ConfigError, DataError, nearest
from pipestill.model.seeding import derive

Sample = tuple[Tensor, int]
NOISE, _NOISE_BATCHES = "noise", 16

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, by channel; usual for any photographs
_CIFAR_FOLDER, _CIFAR_PAGE = "cifar-10-batches-py", "https://www.cs.toronto.edu/~kriz/cifar.html"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_OPENED = 1_000  # images of a tree that are read before training: all of a smaller one, else the first of each class
_SHOWN = 5  # of what is wrong with a data set


@dataclass(frozen=True)
class Images:
    """Two sets of samples (image, label): images (channels, size, size) from 0 to 255, or 0 to 1 where they are floats."""

    train: Dataset[Any]
    test: Dataset[Any]
    channels: int
    size: int
    num_classes: int

    def loaders(
        self, batch_size: int, *, augment: bool, num_samples: int | None = None, workers: int = 0
    ) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Loaders of (images, labels) to train from, shuffled and perhaps moved and mirrored, and to test with."""
        count = len(self.train)  # type: ignore[arg-type]
        seen = self.train if num_samples is None else Subset(self.train, range(min(num_samples, count)))
        mixed = Collate(self.channels, self.size // 8 if augment else 0)
        context = "forkserver" if workers else None  # a loader that is read by a thread must not fork
        common: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": context}
        return (
            DataLoader(seen, batch_size=batch_size, shuffle=True, collate_fn=mixed, **common),
            DataLoader(self.test, batch_size=max(batch_size, 256), collate_fn=Collate(self.channels), **common),
        )


@dataclass(frozen=True)
class Collate:
    """Samples -> images (rows, channels, size, size) and labels (rows,). Photographs are brought to mean 0 and deviation 1.

    `shift`: each image is mirrored or not, and moved by up to that many pixels, drawn anew each time (He et al. 2016,
    section 4.2).
    """

    channels: int
    shift: int = 0

    def __call__(self, samples: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor]:
        images = torch.stack([image for image, _ in samples])
        labels = torch.tensor([int(label) for _, label in samples])
        if images.dtype == torch.uint8:
            images = images.float() / 255.0
            if self.channels == 3:
                mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
                images = (images - mean) / deviation
        return (moved(images, self.shift) if self.shift else images), labels


def moved(images: Tensor, shift: int) -> Tensor:
    """Images (rows, channels, size, size), each moved by up to `shift` pixels and mirrored with chance 1/2."""
    rows, _, height, width = images.shape
    padded = nn.functional.pad(images, (shift, shift, shift, shift))
    down, right = (torch.randint(0, 2 * shift + 1, (rows, 1)) for _ in range(2))
    at_row, at_column = down + torch.arange(height), right + torch.arange(width)
    mirrored = torch.where(torch.rand(rows, 1) < 0.5, at_column.flip(1), at_column)
    picked = padded.movedim(1, -1)[torch.arange(rows)[:, None, None], at_row[:, :, None], mirrored[:, None, :]]
    return picked.movedim(-1, 1).contiguous()


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's digits as images (rows, 1, 8, 8), 0 to 1, and labels (rows,): 1,437 to train, 360 to test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("the digits are read from scikit-learn, which is not installed; run pip install scikit-learn") from None
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive(seed, "split")))
    cut = len(labels) * 4 // 5
    train, test = order[:cut], order[cut:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def open_images(path: str | Path, size: int, *, augment: bool, classes: Sequence[str] | None = None) -> Images:
    """What lies at `path`: a folder of CIFAR-10's files, or of `train` and `val`, each with a folder of images a class.

    Images of folders are brought to `size` x `size`; CIFAR-10's are 32 x 32. `classes`: only these folders. Raises
    `DataError` with what is missing, empty or broken as far as that can be seen without decoding everything.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"no directory '{path}'; pass one of CIFAR-10's files, or of 'train' and 'val' folders of images")
    for folder in (path, path / _CIFAR_FOLDER):
        if (folder.name == _CIFAR_FOLDER and folder.is_dir()) or (folder / "data_batch_1").exists():
            if classes is not None:
                raise ConfigError(
                    f"a list of classes is for folders of images, and '{path}' holds CIFAR-10's files; leave it out"
                )
            return cifar10(folder)
    if (path / "train").is_dir():
        return image_folders(path, size, augment=augment, classes=classes)
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:_SHOWN]) or "nothing"
    raise DataError(
        f"'{path}' is no data set: expected the files of {_CIFAR_FOLDER} (data_batch_1 to 5, test_batch, from {_CIFAR_PAGE}), "
        f"or folders 'train' and 'val' with a folder of images for each class; found {found}"
    )


# -- CIFAR-10 ---------------------------------------------------------------------------------------------------------


def cifar10(folder: Path) -> Images:
    """Read CIFAR-10's python version: five files to train and one to test.

    Each is a pickled dict of `data`, (rows, 3072) bytes, and `labels`.
    """
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"'{folder}' lacks {', '.join(missing)}; unpack CIFAR-10's python version anew ({_CIFAR_PAGE})")
    sets, problems = [], []
    for name in names:
        try:
            sets.append(_cifar_file(folder / name))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(f"{'; '.join(problems)}; unpack CIFAR-10's python version anew ({_CIFAR_PAGE})")
    images = torch.cat([images for images, _ in sets[:-1]])
    labels = torch.cat([labels for _, labels in sets[:-1]])
    return Images(TensorDataset(images, labels), TensorDataset(*sets[-1]), 3, 32, 10)


class _PlainPickle(pickle.Unpickler):
    """Arrays and plain values only: a pickle may otherwise run anything."""

    _ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if name in self._ALLOWED and module.partition(".")[0] in ("numpy", "_codecs"):
            module = module.replace("numpy.core", "numpy._core") if hasattr(np, "_core") else module
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, and CIFAR-10 holds arrays only")


def _cifar_file(path: Path) -> tuple[Tensor, Tensor]:
    try:
        content = _PlainPickle(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror}") from None
    except Exception as error:  # a broken pickle raises almost anything
        raise DataError(f"'{path}' is no file of CIFAR-10: {type(error).__name__}: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"'{path}' is no file of CIFAR-10: it holds a {type(content).__name__}, expected a dict")
    named = {key.decode() if isinstance(key, bytes) else str(key): value for key, value in content.items()}
    data, labels = named.get("data"), named.get("labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        came = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"'{path}' is no file of CIFAR-10: 'data' is {came}, expected uint8 (rows, 3072)")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(x in range(10) for x in labels):
        count = f"{len(labels)} values" if isinstance(labels, list) else type(labels).__name__
        raise DataError(f"'{path}' is no file of CIFAR-10: 'labels' is {count}, expected {len(data)} from 0 to 9")
    return torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()), torch.tensor(labels)


# -- folders of images ------------------------------------------------------------------------------------------------


def image_folders(path: Path, size: int, *, augment: bool, classes: Sequence[str] | None = None) -> Images:
    """`path`/train/CLASS/IMAGE and `path`/val/CLASS/IMAGE, read with Pillow as they are needed (ImageNet's layout).

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
    """Pillow's module of images; `ConfigError` where it is missing."""
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError("folders of images are read with Pillow, which is not installed; run pip install pillow") from None
    return Image


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
        """An image as it lies in its file, (3, height, width) bytes."""
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
    """The largest square in the middle, less a margin of an eighth where images are photographs of usual size."""
    side = min(width, height) * (0.875 if size > 64 else 1.0)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_part(width: int, height: int) -> tuple[float, float, float, float]:
    """Between 8 % and all of the area, with sides between 3:4 and 4:3."""
    share, stretch, x, y = torch.rand(4).tolist()
    area = width * height * (0.08 + 0.92 * share)
    ratio = (4 / 3) ** (2 * stretch - 1)
    w, h = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
    left, top = x * (width - w), y * (height - h)
    return left, top, left + w, top + h


# -- noise ------------------------------------------------------------------------------------------------------------


def choose_images(
    data: str | None,
    preset: str,
    form: tuple[int, int, int],
    *,
    batch_size: int,
    augment: bool,
    seed: int,
    page: str,
    classes: str | None = None,
) -> Images:
    """What a recipe of images learns from: `data`, a path or "noise", or what is embedded for its preset.

    `form` is (channels, size, classes), `page` where the docs tell of the data, `classes` a file that names the only
    folders of images to read. `ConfigError` for a preset without any data.
    """
    channels, size, num_classes = form
    if classes is not None and (data == NOISE or (data is None and preset == "digits")):
        raise ConfigError("a list of classes is for folders of images; give --data PATH too, or leave it out")
    if data == NOISE:
        return noise(channels, size, num_classes, _NOISE_BATCHES * batch_size, seed)
    if data is not None:
        names = None if classes is None else read_classes(classes)
        return open_images(data, size, augment=augment, classes=names)
    if preset == "digits":
        return Images(*digits(seed), 1, 8, 10)
    raise ConfigError(
        f"preset '{preset}' reads its images from --data PATH (see {page}); --data {NOISE} measures speed without any"
    )


def noise(channels: int, size: int, num_classes: int, num_samples: int, seed: int) -> Images:
    """Images of noise with labels that mean nothing: to measure speed in a form whose data is not at hand."""
    train, test = (
        Noise(channels, size, num_classes, count, derive(seed, half))
        for half, count in (("train", num_samples), ("test", max(1, num_samples // 8)))
    )
    return Images(train, test, channels, size, num_classes)


@dataclass(frozen=True)
class Noise(Dataset[Sample]):
    """Samples that follow from the seed and their index."""

    channels: int
    size: int
    num_classes: int
    num_samples: int
    seed: int

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        draw = random.Random(derive(self.seed, index))
        raw = bytearray(draw.randbytes(self.channels * self.size**2))
        image = torch.frombuffer(raw, dtype=torch.uint8).view(self.channels, self.size, self.size)
        return image, draw.randrange(self.num_classes)
