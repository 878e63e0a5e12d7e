"""The form of a tensor that crosses a boundary (its shape, type and strides) as a function of the number of rows.

Tensors arrive with the strides they had: sums in another order of memory differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FEW = 2
"""Rows of the first run from which forms are observed."""
MORE = 3
"""Rows of the second run. What differs between the two runs grows with the rows; what does not is fixed."""


@dataclass(frozen=True, slots=True)
class LinearInRows:
    """A whole number, such as a size or a stride, that is `per_row` * rows + `fixed`."""

    per_row: int
    fixed: int

    @classmethod
    def between(cls, few: int, more: int) -> LinearInRows:
        """The number that is `few` at `FEW` rows and `more` at `MORE` rows."""
        per_row = (more - few) // (MORE - FEW)
        return cls(per_row, few - per_row * FEW)

    def of(self, rows: int) -> int:
        """The number at that many rows."""
        return self.per_row * rows + self.fixed


@dataclass(frozen=True, slots=True)
class TensorForm:
    """Shape, type and strides of a tensor that travels, for any number of rows."""

    shape: tuple[LinearInRows, ...]
    dtype: torch.dtype
    strides: tuple[LinearInRows, ...]
    """In elements, not bytes. A stride of 0 repeats one slice along its axis."""
    lasting: bool
    """Whether the tensor is the same memory every time, such as a buffer, which the next forward may write to."""

    @classmethod
    def between(cls, few: Tensor, more: Tensor) -> TensorForm:
        """The form that one tensor has at `FEW` rows and the other at `MORE` rows."""
        shape = tuple(LinearInRows.between(a, b) for a, b in zip(few.shape, more.shape, strict=True))
        strides = tuple(LinearInRows.between(a, b) for a, b in zip(few.stride(), more.stride(), strict=True))
        lasting = few.untyped_storage().data_ptr() == more.untyped_storage().data_ptr()
        return cls(shape, more.dtype, strides, lasting)

    def shape_of(self, rows: int) -> tuple[int, ...]:
        """The shape at that many rows."""
        return tuple(size.of(rows) for size in self.shape)

    def num_bytes(self, rows: int) -> int:
        """The bytes that travel: those of a contiguous tensor of this shape and type."""
        return torch.Size(self.shape_of(rows)).numel() * self.dtype.itemsize

    def order(self, rows: int) -> list[int]:
        """The axes, from the one whose steps are longest in memory to the shortest."""
        return _slowest_first(self._strides(rows))

    def empty(self, rows: int, device: torch.device) -> Tensor:
        """Make a buffer with room for what `pack` returns, (elements,)."""
        return torch.empty(torch.Size(self.shape_of(rows)).numel(), dtype=self.dtype, device=device)

    def pack(self, tensor: Tensor, rows: int) -> Tensor:
        """Lay a tensor of this form out along one contiguous axis, without a copy where its memory allows that."""
        resolved = tensor.detach().resolve_conj().resolve_neg()  # both are flags of a tensor, and flags do not travel
        packed = resolved.permute(self.order(rows)).contiguous().view(-1)
        return packed.clone() if self.lasting else packed

    def unpack(self, packed: Tensor, rows: int) -> Tensor:
        """Undo `pack`: the tensor that was packed, with the strides of this form."""
        shape, strides = self.shape_of(rows), self._strides(rows)
        order = self.order(rows)
        if _without_gaps(shape, strides):
            return packed.as_strided(shape, strides)
        back = sorted(range(len(order)), key=order.__getitem__)
        dense = packed.view([shape[axis] for axis in order]).permute(back)
        once = [1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True)]
        first = dense[tuple(slice(size) for size in once)]
        if _overlap(once, strides) or (0 in strides and not bool((first == dense).all())):
            return dense  # slices that were one slice on the sample batch differ here, or share memory
        spaced = torch.empty_strided(once, strides, dtype=self.dtype, device=packed.device).copy_(first)
        return spaced.as_strided(shape, strides)

    def _strides(self, rows: int) -> tuple[int, ...]:
        """The strides at that many rows, in elements."""
        return tuple(stride.of(rows) for stride in self.strides)


def _slowest_first(strides: Sequence[int]) -> list[int]:
    """Sort axes by their strides, the longest first."""
    return sorted(range(len(strides)), key=lambda axis: (-strides[axis], axis))


def _without_gaps(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill one piece of memory, each place once."""
    expected = 1
    for axis in reversed(_slowest_first(strides)):
        if shape[axis] != 1 and strides[axis] != expected:
            return False
        expected *= shape[axis]
    return True


def _overlap(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements may share a place in memory."""
    reach = 1
    for axis in reversed(_slowest_first(strides)):
        if shape[axis] > 1:
            if strides[axis] < reach:
                return True
            reach += (shape[axis] - 1) * strides[axis]
    return False
