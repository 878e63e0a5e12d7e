"""The form of a tensor that crosses a boundary: shape, type and strides, for any number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FEW, MORE = 2, 3


@dataclass(frozen=True, slots=True)
class LinearInRows:
    """A whole number that is `per_row` * rows + `fixed`."""

    per_row: int
    fixed: int

    @classmethod
    def between(cls, few: int, more: int) -> LinearInRows:
        per_row = (more - few) // (MORE - FEW)
        return cls(per_row, few - per_row * FEW)

    def of(self, rows: int) -> int:
        return self.per_row * rows + self.fixed


@dataclass(frozen=True, slots=True)
class TensorForm:
    """Shape, type and strides of a tensor that travels, for any number of rows. A stride of 0 repeats one slice.

    `lasting`: it is the same memory every time, such as a buffer, which the next forward may write to.
    """

    shape: tuple[LinearInRows, ...]
    dtype: torch.dtype
    strides: tuple[LinearInRows, ...]
    lasting: bool

    @classmethod
    def between(cls, few: Tensor, more: Tensor) -> TensorForm:
        """What two tensors, of `FEW` and of `MORE` rows, have in common."""
        shape = tuple(LinearInRows.between(a, b) for a, b in zip(few.shape, more.shape, strict=True))
        strides = tuple(LinearInRows.between(a, b) for a, b in zip(few.stride(), more.stride(), strict=True))
        lasting = few.untyped_storage().data_ptr() == more.untyped_storage().data_ptr()
        return cls(shape, more.dtype, strides, lasting)

    def shape_of(self, rows: int) -> tuple[int, ...]:
        return tuple(size.of(rows) for size in self.shape)

    def order(self, rows: int) -> list[int]:
        """The axes from the slowest in memory to the fastest."""
        return _slowest_first(self._strides(rows))

    def empty(self, rows: int, device: torch.device) -> Tensor:
        """A buffer for what `pack` gives."""
        return torch.empty(torch.Size(self.shape_of(rows)).numel(), dtype=self.dtype, device=device)

    def pack(self, tensor: Tensor, rows: int) -> Tensor:
        """The numbers of `tensor` as one contiguous axis: without a copy, where its memory allows that."""
        resolved = tensor.detach().resolve_conj().resolve_neg()  # else only a flag says so, which does not travel
        packed = resolved.permute(self.order(rows)).contiguous().view(-1)
        return packed.clone() if self.lasting else packed

    def unpack(self, packed: Tensor, rows: int) -> Tensor:
        """The tensor that `pack` was given, with the strides that this form says."""
        shape, strides = self.shape_of(rows), self._strides(rows)
        order = self.order(rows)
        if _without_gaps(shape, strides):
            return packed.as_strided(shape, strides)
        back = sorted(range(len(order)), key=order.__getitem__)
        dense = packed.view([shape[axis] for axis in order]).permute(back)
        once = [1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True)]
        first = dense[tuple(slice(size) for size in once)]
        if _overlap(once, strides) or (0 in strides and not bool((first == dense).all())):
            return dense  # what repeated itself on the sample batch does not here, or cannot be told apart
        spaced = torch.empty_strided(once, strides, dtype=self.dtype, device=packed.device).copy_(first)
        return spaced.as_strided(shape, strides)

    def _strides(self, rows: int) -> tuple[int, ...]:
        return tuple(stride.of(rows) for stride in self.strides)


def _slowest_first(strides: Sequence[int]) -> list[int]:
    """The axes from the slowest in memory to the fastest."""
    return sorted(range(len(strides)), key=lambda axis: (-strides[axis], axis))


def _without_gaps(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the numbers fill a piece of memory, each once."""
    expected = 1
    for axis in reversed(_slowest_first(strides)):
        if shape[axis] != 1 and strides[axis] != expected:
            return False
        expected *= shape[axis]
    return True


def _overlap(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two numbers may share a place in memory."""
    reach = 1
    for axis in reversed(_slowest_first(strides)):
        if shape[axis] > 1:
            if strides[axis] < reach:
                return True
            reach += (shape[axis] - 1) * strides[axis]
    return False
