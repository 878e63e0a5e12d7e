"""A batch as all ranks know it, and how it is split into microbatches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

HEADER_LENGTH = 4
"""How many numbers the header of a batch has."""


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
    targets: Any = None
    length: int = 0
    """The size of the length axis, for data whose batches differ in it; else 0."""

    @property
    def ended(self) -> bool:
        """Whether this marks the end of the data."""
        return self.rows == 0

    def header(self) -> Tensor:
        """What every rank has to know, as whole numbers."""
        return torch.tensor([self.rows, self.epoch, self.last, self.length], dtype=torch.int64)

    def view(self, index: int) -> Any:
        """One view of the samples, where the inputs are a tuple of views."""
        return self.inputs[index]

    @classmethod
    def from_header(cls, header: Tensor) -> Batch:
        """The batch as a rank knows it that has received its header only."""
        rows, epoch, last, length = header.tolist()
        return cls(rows, epoch, bool(last), length=length)


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
