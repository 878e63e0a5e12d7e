"""Batches as all ranks know them: split into microbatches, or put together to windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

HEADER_LENGTH = 4
"""How many numbers the header of a batch has, without its counts."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch of an epoch, or the end of the data.

    Only the rank that reads it has `inputs`; that rank and the rank of the loss have `targets`.
    """

    rows: int
    """How many samples it has; 0 marks the end of the data."""
    epoch: int
    last: bool
    """Whether its epoch, or the run, ends with it."""
    inputs: Any = None
    """The samples: a tuple of views where there are several."""
    targets: Any = None
    length: int = 0
    """The size of the length axis, for data whose batches differ in it; else 0."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """How much its targets count for, by part of the loss; parts without a count are means over rows."""

    @property
    def ended(self) -> bool:
        """Whether this marks the end of the data."""
        return self.rows == 0

    def header(self) -> Tensor:
        """Give what every rank has to know, as whole numbers; counts are the bits of theirs."""
        facts = torch.tensor([self.rows, self.epoch, self.last, self.length], dtype=torch.int64)
        return torch.cat([facts, torch.tensor(list(self.counts.values()), dtype=torch.float64).view(torch.int64)])

    @classmethod
    def from_header(cls, header: Tensor, counted: Sequence[str] = ()) -> Batch:
        """The batch as a rank knows it that has received its header only; `counted` names the counts."""
        rows, epoch, last, length = header[:HEADER_LENGTH].tolist()
        counts = header[HEADER_LENGTH:].view(torch.float64).tolist()
        return cls(rows, epoch, bool(last), length=length, counts=dict(zip(counted, counts, strict=True)))

    def factors(self, parts: Sequence[str], rows: int) -> list[float]:
        """By what each part of a loss over `rows` of these rows is multiplied, so that all of them add up to the batch's mean.

        A part with a count is a sum over what counts, so that is 1 / the batch's count, and 0 where the batch counts for nothing.
        The others are means over rows, so that is the fraction of the batch's rows.
        """
        counts = {name: 1 / count if count else 0.0 for name, count in self.counts.items()}
        return [counts.get(name, rows / self.rows) for name in parts]


@lru_cache(maxsize=64)
def microbatch_rows(rows: int, num_microbatches: int) -> tuple[slice, ...]:
    """The rows of every microbatch. Sizes differ by at most one, the larger first; the last are empty where rows are few."""
    size, extra = divmod(rows, num_microbatches)
    starts = [m * size + min(m, extra) for m in range(num_microbatches + 1)]
    return tuple(slice(a, b) for a, b in pairwise(starts))


class Microbatch(NamedTuple):
    """A slice of a batch that is not empty."""

    number: int
    rows: slice


def split_batch(batch: Batch, num_microbatches: int) -> list[Microbatch]:
    """The microbatches of a batch that have rows."""
    slices = enumerate(microbatch_rows(batch.rows, num_microbatches))
    return [Microbatch(number, rows) for number, rows in slices if rows.start < rows.stop]


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
        """The number of the window's batches; the last window of an epoch may have fewer than others."""
        return sum(rows > 0 for rows in self.rows)

    def header(self) -> Tensor:
        """Give what every rank has to know, as whole numbers."""
        return torch.tensor([self.first, self.epoch, self.last, *self.rows], dtype=torch.int64)

    @classmethod
    def from_header(cls, header: Tensor) -> Window:
        """The window that a header describes, without its samples."""
        first, epoch, last, *rows = header.tolist()
        return cls(tuple(rows), first, epoch, bool(last))


def header_length(window: int) -> int:
    """Count the numbers in the header of a window of so many batches."""
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
