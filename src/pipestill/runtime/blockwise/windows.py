"""A window of batches as all ranks know it: what blockwise training takes as one step of its schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipestill.runtime.batch import Batch


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive batches of one epoch, fewer at its end. `rows` has 0 for those that are missing; all 0: the data ended.

    `first` is the number of the first batch in the run. `last`: its epoch, or the run, ends with it. Only ranks that take
    samples have `inputs`.
    """

    rows: tuple[int, ...]
    first: int
    epoch: int
    last: bool
    inputs: tuple[Any, ...] | None = None

    @property
    def ended(self) -> bool:
        return not any(self.rows)

    @property
    def num_batches(self) -> int:
        """How many batches the window has; the last one of an epoch may have fewer than others."""
        return sum(rows > 0 for rows in self.rows)

    def header(self) -> Tensor:
        """What every rank has to know, as whole numbers."""
        return torch.tensor([self.first, self.epoch, self.last, *self.rows], dtype=torch.int64)

    @classmethod
    def from_header(cls, header: Tensor) -> Window:
        """The window that a header describes, without its samples."""
        first, epoch, last, *rows = header.tolist()
        return cls(tuple(rows), first, epoch, bool(last))


def header_length(window: int) -> int:
    """How many numbers the header of a window of so many batches has."""
    return 3 + window


def windows(batches: Iterator[Batch], size: int) -> Iterator[Window]:
    """Batches in windows of `size`, which end with an epoch; then, for ever, that the data ended."""
    count, waiting = 0, list[Batch]()
    for batch in batches:
        waiting.append(batch)
        if len(waiting) == size or batch.last:
            rows = [b.rows for b in waiting] + [0] * (size - len(waiting))
            yield Window(tuple(rows), count, batch.epoch, batch.last, tuple(b.inputs for b in waiting))
            count += len(waiting)
            waiting = []
    while True:
        yield Window((0,) * size, count, 0, True)
