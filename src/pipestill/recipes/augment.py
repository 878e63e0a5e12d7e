"""Views of images: random parts, colours and blurs, drawn anew each time, in torch alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from pipestill.recipes.image_folders import Folder
from pipestill.recipes.images import DEVIATION, MEAN, Images, Sample

View = Callable[[Sequence[Tensor]], Tensor]
"""Images (channels, h, w), of any heights and widths -> a view of each, (rows, channels, size, size)."""

_GREY = (0.299, 0.587, 0.114)  # what each of red, green and blue counts in an image's brightness
_BLURRED_FROM = 64  # pixels: smaller images are not blurred (Chen et al. 2020, appendix B.9)


def view_loader(
    images: Images, views: Sequence[View], batch_size: int, *, num_samples: int | None = None, workers: int = 0
) -> DataLoader[Any]:
    """Make a shuffled loader of ((view, view, ...), None) of the images to train on; labels are not passed on.

    The loader's workers make the views, each image's from all of it as it lies in its file. They draw from generators that
    the loader seeds anew in each epoch from that of whoever reads it.
    """
    seen: Dataset[Any] = Whole(images.train) if isinstance(images.train, Folder) else images.train
    if num_samples is not None:
        seen = Subset(seen, range(min(num_samples, len(seen))))  # type: ignore[arg-type]
    return DataLoader(
        seen, batch_size=batch_size, shuffle=True, collate_fn=Views(tuple(views)), num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,  # a loader that is read by a thread must not fork
    )  # fmt: skip


@dataclass(frozen=True)
class Whole(Dataset[Sample]):
    """A folder's images as they lie in their files, (3, height, width)."""

    folder: Folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> Sample:
        return self.folder.whole(index)


@dataclass(frozen=True)
class Views:
    """Turns samples (image, label) into a batch of views without targets."""

    views: tuple[View, ...]

    def __call__(self, samples: Sequence[Sample]) -> tuple[tuple[Tensor, ...], None]:
        images = [image for image, _ in samples]
        return tuple(view(images) for view in self.views), None


# -- small scans ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scans:
    """Grey images of one size, 0 to 1: each turned, moved, brighter or darker, with noise, and seen through a window.

    `window` is the range of its side, as a share of the image's; what it shows is brought to `size` x `size`. `moved` is how
    far at most its middle goes from the image's, as a share of half the image. `turned` in degrees, `contrast` and
    `noise` in parts of full brightness.
    """

    size: int
    window: tuple[float, float] = (0.9, 1.1)
    moved: float = 0.25
    turned: float = 10.0
    contrast: float = 0.3
    noise: float = 0.1

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        batch = torch.stack(list(images))
        rows, channels = batch.shape[:2]
        side, angle, right, down, contrast = (
            torch.empty(rows).uniform_(low, high)
            for low, high in (
                self.window, (-self.turned, self.turned), (-self.moved, self.moved), (-self.moved, self.moved),
                (1.0 - self.contrast, 1.0 + self.contrast),
            )
        )  # fmt: skip
        cos, sin = side * torch.deg2rad(angle).cos(), side * torch.deg2rad(angle).sin()
        places = torch.stack([torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)], 1)
        grid = F.affine_grid(places, [rows, channels, self.size, self.size], align_corners=False)
        seen = F.grid_sample(batch, grid, align_corners=False)
        return seen * contrast.view(-1, 1, 1, 1) + self.noise * torch.randn_like(seen)


# -- photographs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Photographs:
    """Colour images, bytes (3, h, w): a random part of each, perhaps mirrored, in other colours, grey, blurred, solarised.

    `share` is the range of the part's area, `blurred` and `solarised` are chances. Values at the end have mean 0 and
    deviation 1. (BYOL, Grill et al. 2020, appendix B; MoCo v3 has the same; DINO, Caron et al. 2021, adds smaller parts.)
    Hues are turned in the plane of colours of the same brightness, by a matrix.
    """

    size: int
    share: tuple[float, float] = (0.08, 1.0)
    blurred: float = 1.0
    solarised: float = 0.0

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        return torch.stack([self.one(image) for image in images])

    def one(self, image: Tensor) -> Tensor:
        """Make a view of one image."""
        image = part_of(image.float() / 255.0, self.size, self.share)
        if happens(0.5):
            image = image.flip(2)
        if happens(0.8):
            image = other_colours(image, 0.4, 0.4, 0.2, 0.1)
        if happens(0.2):
            image = grey(image).expand(3, -1, -1)
        if self.size >= _BLURRED_FROM and happens(self.blurred):
            image = blurred(image, between(0.1, 2.0))
        if happens(self.solarised):
            image = torch.where(image < 0.5, image, 1.0 - image)
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
        return (image - mean) / deviation


def happens(chance: float) -> bool:
    """Draw whether something happens that has this chance."""
    return between(0.0, 1.0) < chance


def between(low: float, high: float) -> float:
    """Draw a number evenly from [low, high)."""
    return low + (high - low) * float(torch.rand(()))


def part_of(image: Tensor, size: int, share: tuple[float, float]) -> Tensor:
    """Cut out a part with a share of the area and sides of 3:4 to 4:3 (Szegedy et al. 2015, section 6): (3, size, size)."""
    height, width = image.shape[1:]
    area = between(*share) * height * width
    ratio = math.exp(between(-math.log(4 / 3), math.log(4 / 3)))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    left, top = (int(between(0, room + 1)) for room in (width - w, height - h))
    part = image[:, top : top + h, left : left + w].unsqueeze(0)
    resized = F.interpolate(part, (size, size), mode="bicubic", antialias=True)
    return resized[0].clamp(0.0, 1.0)


def other_colours(image: Tensor, brightness: float, contrast: float, saturation: float, hue: float) -> Tensor:
    """Change each of these of an image (3, h, w) by up to a share (of a full turn for the hue), in any order."""
    changes: list[Callable[[Tensor, float], Tensor]] = [
        lambda x, by: x * (1.0 + by),
        lambda x, by: x + by * (x - grey(x).mean()),
        lambda x, by: x + by * (x - grey(x)),
        turned_hue,
    ]
    amounts = (brightness, contrast, saturation, hue)
    for index in torch.randperm(4).tolist():
        image = changes[index](image, between(-amounts[index], amounts[index])).clamp(0.0, 1.0)
    return image


def grey(image: Tensor) -> Tensor:
    """Compute the brightness (1, h, w) of an image (3, h, w)."""
    return torch.einsum("c,chw->hw", torch.tensor(_GREY), image).unsqueeze(0)


def turned_hue(image: Tensor, turns: float) -> Tensor:
    """Turn an image's colours about the axis of greys; the brightness stays."""
    angle = 2 * math.pi * turns
    axis = torch.full((3, 3), 1 / 3)
    across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    turn = torch.eye(3) * math.cos(angle) + axis * (1 - math.cos(angle)) + across * math.sin(angle)
    turned = torch.einsum("dc,chw->dhw", turn, image)
    return turned + grey(image) - grey(turned)


def blurred(image: Tensor, sigma: float) -> Tensor:
    """Blur an image (3, h, w), reflected at its edges, by a Gaussian of `sigma` pixels."""
    radius = min(math.ceil(3 * sigma), min(image.shape[1:]) - 1)
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    padded = F.pad(image.unsqueeze(0), (radius,) * 4, mode="reflect")
    across = F.conv2d(padded, weights, groups=3)
    return F.conv2d(across, weights.transpose(2, 3), groups=3)[0]
