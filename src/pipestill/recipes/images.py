"""Two sets of images with labels, to train on and to test with, and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

Sample = tuple[Tensor, int]

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, by channel; usual for any photographs


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
        """Make loaders of (images, labels) to train from, shuffled and perhaps moved and mirrored, and to test with."""
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
    """Turns samples into images (rows, channels, size, size), photographs of mean 0 and deviation 1, and labels (rows,).

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
    """Move each of images (rows, channels, size, size) by up to `shift` pixels, and mirror it with chance 1/2."""
    rows, _, height, width = images.shape
    padded = nn.functional.pad(images, (shift, shift, shift, shift))
    down, right = (torch.randint(0, 2 * shift + 1, (rows, 1)) for _ in range(2))
    at_row, at_column = down + torch.arange(height), right + torch.arange(width)
    mirrored = torch.where(torch.rand(rows, 1) < 0.5, at_column.flip(1), at_column)
    picked = padded.movedim(1, -1)[torch.arange(rows)[:, None, None], at_row[:, :, None], mirrored[:, None, :]]
    return picked.movedim(-1, 1).contiguous()
