"""The contracts of all boundaries of a pipeline, for batches of any number of rows and any length.

Batches differ in length where they are token sequences, say, each batch padded to its longest. Every whole number of a contract
(a size, a stride) is taken to be a polynomial of degree 2 in the length, since an attention mask has length x length elements.
Dry runs at three lengths determine it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pipestill.errors import DataError, ModelError
from pipestill.model.buffers import SharedBuffer
from pipestill.model.contracts import ConstantLeaf, Contract, Leaf, LinearInRows, TensorForm, TensorLeaf
from pipestill.model.nests import distinct_tensors


@dataclass(frozen=True)
class PipelineContracts:
    """The contracts of a task: of a batch's inputs and targets, and of every boundary between blocks, in every view."""

    inputs: Contract
    targets: Contract
    student: tuple[tuple[Contract, ...], ...]
    """By view, then by block: the value after each student block."""
    teacher: tuple[tuple[Contract, ...], ...]
    """By view that the teacher sees, then by block: the value after each teacher block."""
    loss_parts: tuple[str, ...]
    """The names under which the loss returns its parts, in its order."""
    copies: frozenset[int]
    """Student blocks whose input is written to in place, by themselves or by a later block. Where block 0 is among them, it
    gets a copy of its rows: microbatches are slices of one batch, and autograd counts writes to the batch as a whole."""
    counted: tuple[str, ...] = ()
    """The parts of the loss that a batch's targets count for (see `Task.loss_counts`); the others are means over rows."""
    feature_parts: tuple[tuple[str, ...], ...] = ()
    """The names of the parts of feature losses, for each student block that has some, in order."""
    taps: tuple[Contract, ...] = ()
    """The contracts of the teacher's tensors that feature losses take."""
    teacher_copies: frozenset[int] = frozenset()
    """Teacher blocks whose output a later block writes to in place; what feature losses take of it is copied."""
    unsplit: Mapping[int, str] = field(default_factory=dict)
    """Student blocks whose backward cannot be taken in two halves, and why."""
    shared_buffers: tuple[SharedBuffer, ...] = ()
    """Buffers of both models that one block writes and another uses, which may not be in two stages."""
    by_length: PipelineContractsByLength | None = field(default=None, repr=False)
    """The contracts of batches of any length; None where batches do not differ in length."""

    @property
    def all_parts(self) -> tuple[str, ...]:
        """The names of all parts of the loss: those of the outputs' loss, then those of feature losses."""
        return (*self.loss_parts, *(name for names in self.feature_parts for name in names))

    def at(self, length: int) -> PipelineContracts:
        """The contracts for batches of that length; the same at any length where batches do not differ in it."""
        return self if self.by_length is None else self.by_length.at(length)


class PipelineContractsByLength:
    """The contracts of a task for batches of any length, from its contracts at three lengths, the longest last.

    Raises `ModelError` where these differ in more than their numbers.
    """

    def __init__(self, lengths: tuple[int, int, int], contracts: Sequence[PipelineContracts]) -> None:
        self.lengths = lengths
        self.contracts = contracts
        self.at = lru_cache(maxsize=256)(self._at)
        self.at(lengths[0])

    def _at(self, length: int) -> PipelineContracts:
        """Derive the contracts for batches of that length."""
        at = AtLength(self.lengths, length)

        def derived(views: Sequence[tuple[tuple[Contract, ...], ...]]) -> tuple[tuple[Contract, ...], ...]:
            same_view = zip(*views, strict=True)
            return tuple(tuple(at.contract(same) for same in zip(*blocks, strict=True)) for blocks in same_view)

        return replace(
            self.contracts[-1],
            inputs=at.contract([c.inputs for c in self.contracts]),
            targets=at.contract([c.targets for c in self.contracts]),
            student=derived([c.student for c in self.contracts]),
            teacher=derived([c.teacher for c in self.contracts]),
            taps=tuple(at.contract(same) for same in zip(*(c.taps for c in self.contracts), strict=True)),
        )


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
class AtLength:
    """Derives contracts of batches of one length from those of batches of three known lengths."""

    known: tuple[int, int, int]
    length: int

    def contract(self, same: Sequence[Contract]) -> Contract:
        """One boundary's contract. `same`: its contracts at the known lengths; `ModelError` where they differ too much."""
        first = same[0]
        for other in same[1:]:
            if other.spec != first.spec or len(other.leaves) != len(first.leaves):
                raise ModelError(f"{first.where}: the structure changes with the length: {first.spec} and {other.spec}")
        leaves = zip(*(contract.leaves for contract in same), strict=True)
        return replace(first, leaves=tuple(self._leaf(first.where, leaf) for leaf in leaves))

    def _leaf(self, where: str, same: Sequence[Leaf]) -> Leaf:
        """One leaf, from the same leaf at the known lengths."""
        first = same[0]
        tensors = [leaf for leaf in same if isinstance(leaf, TensorLeaf)]
        if isinstance(first, TensorLeaf) and len(tensors) == len(same):
            gradients = [leaf.gradient for leaf in tensors if leaf.gradient is not None]
            if len({leaf.tracked for leaf in tensors}) > 1 or len(gradients) not in (0, len(same)):
                raise ModelError(f"{where}: whether a tensor gets a gradient changes with the length")
            form = self._form(where, [leaf.value for leaf in tensors])
            return TensorLeaf(form, first.tracked, self._form(where, gradients) if gradients else None)
        values = [leaf.value for leaf in same if isinstance(leaf, ConstantLeaf)]
        whole = [isinstance(value, (int, LinearInRows)) and not isinstance(value, bool) for value in values]
        if len(values) == len(same) and all(whole):
            number = self._number([v if isinstance(v, LinearInRows) else LinearInRows(0, v) for v in values])
            return ConstantLeaf(number if number.per_row else number.fixed)
        if any(leaf != first for leaf in same):
            raise ModelError(f"{where}: {first} changes with the length, to {same[-1]}; pass a tensor")
        return first

    def _form(self, where: str, forms: Sequence[TensorForm]) -> TensorForm:
        """One tensor's form, from its forms at the known lengths."""
        if len({(form.dtype, len(form.shape)) for form in forms}) > 1:
            raise ModelError(f"{where}: a tensor's type or axes change with the length")
        shape = tuple(self._number(sizes) for sizes in zip(*(form.shape for form in forms), strict=True))
        strides = tuple(self._number(sizes) for sizes in zip(*(form.strides for form in forms), strict=True))
        return TensorForm(shape, forms[0].dtype, strides, any(form.lasting for form in forms))

    def _number(self, numbers: Sequence[LinearInRows]) -> LinearInRows:
        """One size or stride, from those at the known lengths."""
        return LinearInRows(self._value([n.per_row for n in numbers]), self._value([n.fixed for n in numbers]))

    def _value(self, values: Sequence[int]) -> int:
        """Evaluate the polynomial of degree 2 through the values at the known lengths (Lagrange's form).

        A result that is no whole number is rounded down. A boundary whose sizes follow another law is refused by `split`
        once a batch of such a length crosses it.
        """
        a, b, c = self.known
        x, y, z = values
        length = self.length
        total = (
            Fraction(x * (length - b) * (length - c), (a - b) * (a - c))
            + Fraction(y * (length - a) * (length - c), (b - a) * (b - c))
            + Fraction(z * (length - a) * (length - b), (c - a) * (c - b))
        )
        return total.numerator // total.denominator
