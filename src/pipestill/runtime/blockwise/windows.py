"""Windows: the consecutive batches that blockwise training takes as one step of its schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipestill.runtime.batch import Batch


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive batches of one epoch, fewer at its end. Only ranks that take samples have `inputs`."""

    rows: tuple[int, ...]
    """The rows of each batch; 0 for batches that are missing. All are 0 after the end of the data."""
    first: int
    """The number of the first batch in the run."""
    epoch: int
    last: bool
    """Whether its epoch, or the run, ends with it."""
    inputs: tuple[Any, ...] | None = None

    @property
    def ended(self) -> bool:
        """Whether this marks the end of the data."""
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
    """Put batches into windows of `size`, which end with an epoch; then, for ever, give windows that mark the end."""
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
