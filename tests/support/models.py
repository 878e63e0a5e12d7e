"""Small models with everything that makes pipelining hard, and data for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import pipestill as ps

CLASSES = 5
ROWS = (13, 13, 8, 2)  # uneven for 3 and 8 microbatches; the last is smaller than either


class AlwaysDropout(nn.Module):
    """Drops in eval mode too, as F.dropout does when nobody passes it the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.2)


class Pool(nn.Module):
    """(rows, channels, h, w) -> (rows, channels); its gradient is one number repeated over h and w."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def student() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.2),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.BatchNorm2d(6, momentum=None),
        nn.ReLU(inplace=True),
        Pool(),
        nn.Dropout(0.3),
        nn.Linear(6, CLASSES),
    )


def teacher() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Sequential(nn.ReLU(inplace=True), nn.Dropout2d(0.5), AlwaysDropout()),
        nn.Sequential(Pool(), nn.Linear(8, CLASSES)),
    )


def distillation() -> ps.Distillation:
    return ps.Distillation(teacher(), student(), ps.losses.SoftTarget(temperature=3.0, weight=0.7))


def images(rows: Sequence[int] = ROWS, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, 4, 4, generator=generator), torch.randint(CLASSES, (n,), generator=generator)) for n in rows]


def vectors(rows: Sequence[int] = (10, 10, 7), features: int = 4, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, features, generator=generator), torch.randint(CLASSES, (n,), generator=generator)) for n in rows]


class Stream(IterableDataset[Any]):
    """Batches of vectors whose number nobody knows beforehand, drawn anew in every epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for n in (9, 9, 4):
            yield torch.randn(n, 4), torch.randint(CLASSES, (n,))
