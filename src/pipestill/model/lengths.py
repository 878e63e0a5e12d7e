"""Contracts of batches that differ in length, such as token sequences that are padded to the longest of their batch.

Every whole number of a contract (a size, a stride) is taken to be a polynomial of degree 2 in the length, since an attention
mask has length x length elements. Dry runs at three lengths determine it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pipestill.errors import DataError, ModelError
from pipestill.model.contracts import ConstantLeaf, Contract, Leaf, TensorLeaf
from pipestill.model.nests import distinct_tensors
from pipestill.model.tensor_form import LinearInRows, TensorForm


def length_of(axis: int, inputs: Any, targets: Any, what: str) -> int:
    """Find the length of a batch: the size of `axis`, which all of its tensors that have such an axis share.

    Raises `DataError`, which begins with `what`, when they differ in it or none has it.
    """
    tensors = [*distinct_tensors(inputs), *distinct_tensors(targets)]
    sizes = {tensor.shape[axis] for tensor in tensors if tensor.dim() > axis}
    if len(sizes) != 1:
        raise DataError(
            f"{what}: length_axis is {axis}, so all tensors that have an axis {axis} must have the same size there, got "
            f"shapes {[tuple(tensor.shape) for tensor in tensors]}; give a tensor without a length no axis {axis}, or leave "
            "length_axis out"
        )
    return sizes.pop()


def shortened(axis: int, value: Any, length: int) -> Any:
    """Take the first `length` places of `axis` in every tensor that has it, from the beginning again where there are too few."""

    def taken(tensor: Tensor) -> Tensor:
        return tensor.index_select(axis, torch.arange(length) % tensor.shape[axis]) if tensor.dim() > axis else tensor

    return pytree.tree_map_only(Tensor, taken, value)


def sample_lengths(length: int) -> tuple[int, int, int]:
    """Choose three lengths for dry runs, evenly spaced; the longest is `length`, or 3 where that is larger.

    They are multiples of as large a power of two as `length` allows, since a model may halve lengths again and again.
    """
    step = 1
    while length % (2 * step) == 0 and length - 4 * step >= 1:
        step *= 2
    longest = max(length, 2 * step + 1)
    return longest - 2 * step, longest - step, longest


@dataclass(frozen=True)
class ContractByLength:
    """The contract of one boundary for batches of any length, from its contracts at three lengths."""

    lengths: tuple[int, int, int]
    contracts: tuple[Contract, Contract, Contract]

    def __post_init__(self) -> None:
        """Raise `ModelError` where the three contracts differ in more than their numbers."""
        first = self.contracts[0]
        for other in self.contracts[1:]:
            if other.spec != first.spec or len(other.leaves) != len(first.leaves):
                raise ModelError(f"{first.where}: the structure changes with the length: {first.spec} and {other.spec}")
        self.at(self.lengths[0])

    def at(self, length: int) -> Contract:
        """The boundary's contract for batches of that length."""
        leaves = zip(*(contract.leaves for contract in self.contracts), strict=True)
        return replace(self.contracts[0], leaves=tuple(self._leaf(same, length) for same in leaves))

    def _leaf(self, same: Sequence[Leaf], length: int) -> Leaf:
        """One leaf at that length. `same`: the leaf at the three known lengths."""
        first, where = same[0], self.contracts[0].where
        if isinstance(first, TensorLeaf) and all(isinstance(leaf, TensorLeaf) for leaf in same):
            tensors = [leaf for leaf in same if isinstance(leaf, TensorLeaf)]
            back = [leaf.gradient for leaf in tensors]
            came = [gradient for gradient in back if gradient is not None]
            if len({leaf.tracked for leaf in tensors}) > 1 or len(came) not in (0, len(back)):
                raise ModelError(f"{where}: whether a tensor gets a gradient changes with the length")
            form = self._form([leaf.value for leaf in tensors], length)
            return TensorLeaf(form, first.tracked, self._form(came, length) if came else None)
        if isinstance(first, ConstantLeaf) and all(isinstance(leaf, ConstantLeaf) for leaf in same):
            values = [leaf.value for leaf in same if isinstance(leaf, ConstantLeaf)]
            if all(isinstance(value, (int, LinearInRows)) and not isinstance(value, bool) for value in values):
                numbers = [value if isinstance(value, LinearInRows) else LinearInRows(0, value) for value in values]
                number = self._number(numbers, length)
                return ConstantLeaf(number if number.per_row else number.fixed)
        if any(leaf != first for leaf in same):
            raise ModelError(f"{where}: {first} changes with the length, to {same[-1]}; pass a tensor")
        return first

    def _form(self, forms: Sequence[TensorForm], length: int) -> TensorForm:
        """One tensor's form at that length, from its forms at the three known lengths."""
        if len({(form.dtype, len(form.shape)) for form in forms}) > 1:
            raise ModelError(f"{self.contracts[0].where}: a tensor's type or axes change with the length")
        shape = tuple(self._number(sizes, length) for sizes in zip(*(form.shape for form in forms), strict=True))
        strides = tuple(self._number(sizes, length) for sizes in zip(*(form.strides for form in forms), strict=True))
        return TensorForm(shape, forms[0].dtype, strides, any(form.lasting for form in forms))

    def _number(self, numbers: Sequence[LinearInRows], length: int) -> LinearInRows:
        """One size or stride at that length, from those at the three known lengths."""
        per_row, fixed = ([getattr(n, name) for n in numbers] for name in ("per_row", "fixed"))
        return LinearInRows(self._value(per_row, length), self._value(fixed, length))

    def _value(self, known: Sequence[int], length: int) -> int:
        """Evaluate the polynomial of degree 2 through the three known values (Lagrange's form) at that length.

        A value that is no whole number is rounded down. A boundary whose sizes follow another law is refused by `split`
        once a batch of such a length crosses it.
        """
        a, b, c = self.lengths
        x, y, z = known
        total = (
            Fraction(x * (length - b) * (length - c), (a - b) * (a - c))
            + Fraction(y * (length - a) * (length - c), (b - a) * (b - c))
            + Fraction(z * (length - a) * (length - b), (c - a) * (c - b))
        )
        return total.numerator // total.denominator
