"""The images that a recipe trains on: the embedded digits, CIFAR-10, folders of images, or noise."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset, TensorDataset

from pipestill.errors import ConfigError, DataError
from pipestill.model.seeding import derive
from pipestill.recipes.cifar import CIFAR_FOLDER, CIFAR_PAGE, cifar10
from pipestill.recipes.image_folders import image_folders, read_classes
from pipestill.recipes.images import Images, Sample
from pipestill.recipes.packages import needed

NOISE, _NOISE_BATCHES = "noise", 16
_SHOWN = 5  # entries of a folder that is no data set


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
    """Open the images that a recipe trains on: `data`, a path or "noise", or what is embedded for its preset.

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


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Read scikit-learn's digits: images (rows, 1, 8, 8), 0 to 1, and labels (rows,), 1,437 to train and 360 to test."""
    data = needed("sklearn.datasets", "the digits are read from scikit-learn", "scikit-learn").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive(seed, "split")))
    cut = len(labels) * 4 // 5
    train, test = order[:cut], order[cut:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def open_images(path: str | Path, size: int, *, augment: bool, classes: Sequence[str] | None = None) -> Images:
    """Open what lies at `path`: CIFAR-10's files, or `train` and `val`, each with a folder of images a class.

    Images of folders are brought to `size` x `size`; CIFAR-10's are 32 x 32. `classes`: only these folders. Raises
    `DataError` with what is missing, empty or broken as far as that can be seen without decoding everything.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"no directory '{path}'; pass one of CIFAR-10's files, or of 'train' and 'val' folders of images")
    for folder in (path, path / CIFAR_FOLDER):
        if (folder.name == CIFAR_FOLDER and folder.is_dir()) or (folder / "data_batch_1").exists():
            if classes is not None:
                raise ConfigError(
                    f"a list of classes is for folders of images, and '{path}' holds CIFAR-10's files; leave it out"
                )
            return cifar10(folder)
    if (path / "train").is_dir():
        return image_folders(path, size, augment=augment, classes=classes)
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:_SHOWN]) or "nothing"
    raise DataError(
        f"'{path}' is no data set: expected the files of {CIFAR_FOLDER} (data_batch_1 to 5, test_batch, from {CIFAR_PAGE}), "
        f"or folders 'train' and 'val' with a folder of images for each class; found {found}"
    )


def noise(channels: int, size: int, num_classes: int, num_samples: int, seed: int) -> Images:
    """Make images of noise with labels that mean nothing: to measure speed in a form whose data is not at hand."""
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
