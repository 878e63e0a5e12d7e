"""A batch as all ranks know it, and its cut into microbatches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

HEADER_LENGTH = 4


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch. `rows` 0 marks the end of the data. `last`: its epoch, or the run, ends with it. `length`: of its samples,
    where batches differ in it, else 0.

    Only the reading rank has `inputs`; it and the rank of the loss have `targets`.
    """

    rows: int
    epoch: int
    last: bool
    inputs: Any = None
    targets: Any = None
    length: int = 0

    @property
    def ended(self) -> bool:
        """Whether this marks the end of the data."""
        return self.rows == 0

    def header(self) -> Tensor:
        """What every rank has to know, as whole numbers."""
        return torch.tensor([self.rows, self.epoch, self.last, self.length], dtype=torch.int64)

    def view(self, index: int) -> Any:
        """One view of the samples, of inputs that are a tuple of these."""
        return self.inputs[index]

    @classmethod
    def from_header(cls, header: Tensor) -> Batch:
        rows, epoch, last, length = header.tolist()
        return cls(rows, epoch, bool(last), length=length)


@lru_cache(maxsize=64)
def microbatch_rows(rows: int, num_microbatches: int) -> tuple[slice, ...]:
    """The rows of every microbatch: sizes differ by at most one, the larger first; the last are empty when rows lack."""
    size, extra = divmod(rows, num_microbatches)
    starts = [m * size + min(m, extra) for m in range(num_microbatches + 1)]
    return tuple(slice(a, b) for a, b in pairwise(starts))
