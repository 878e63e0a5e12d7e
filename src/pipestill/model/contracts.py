"""Contracts of boundaries: the structure, constants, tensor forms and gradients that both sides of one agree on beforehand.

A boundary's value is a nest of tensors and other values. Its `Contract` is observed by running a few rows twice, 2 of them and
then 3: what differs grows with the rows, what does not is fixed. Sender and receiver then exchange tensors and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pipestill.errors import ModelError
from pipestill.model.tensor_form import FEW, MORE, LinearInRows, TensorForm


@dataclass(frozen=True, slots=True)
class TensorLeaf:
    """A leaf of a boundary's value that is a tensor and travels."""

    value: TensorForm
    tracked: bool
    """Whether the tensor carries a graph; a gradient may come back for such a tensor only."""
    gradient: TensorForm | None
    """The form of the gradient that comes back; None where none does."""


@dataclass(frozen=True, slots=True)
class AliasLeaf:
    """A leaf that is the same tensor as an earlier leaf. The tensor travels once."""

    leaf: int
    """The number of that earlier leaf."""


@dataclass(frozen=True, slots=True)
class ConstantLeaf:
    """A leaf that is no tensor: the same on both sides, or a number that follows from the rows. It does not travel."""

    value: Any

    def of(self, rows: int) -> Any:
        """The leaf's value at that many rows."""
        return self.value.of(rows) if isinstance(self.value, LinearInRows) else self.value


Leaf = TensorLeaf | AliasLeaf | ConstantLeaf


@dataclass(frozen=True)
class Contract:
    """The agreement on one boundary's value, for any number of rows."""

    where: str
    """The boundary's name in messages, such as "after student block 3 ('layers.3')"."""
    spec: Any
    """The structure of the nest, as PyTorch's pytree describes it."""
    leaves: tuple[Leaf, ...]

    @cached_property
    def tensor_leaves(self) -> list[TensorLeaf]:
        """The leaves that travel, in order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorLeaf)]

    @cached_property
    def values(self) -> list[TensorForm]:
        """The forms of the tensors that travel forward."""
        return [leaf.value for leaf in self.tensor_leaves]

    @cached_property
    def gradients(self) -> list[TensorForm]:
        """The forms of the gradients that travel back."""
        return [leaf.gradient for leaf in self.tensor_leaves if leaf.gradient is not None]

    @cached_property
    def gradient_positions(self) -> list[int]:
        """The positions, among the travelling tensors, of those for which a gradient comes back."""
        return [i for i, leaf in enumerate(self.tensor_leaves) if leaf.gradient is not None]

    @cached_property
    def tracked_positions(self) -> list[int]:
        """The positions, among the travelling tensors, of those that carry a graph."""
        return [i for i, leaf in enumerate(self.tensor_leaves) if leaf.tracked]

    def num_bytes(self, rows: int) -> int:
        """The bytes of everything that travels forward."""
        return sum(form.num_bytes(rows) for form in self.values)

    def split(self, value: Any, rows: int) -> list[Tensor]:
        """List the tensors of `value` that travel, in order; `ModelError` when the value breaks the contract."""
        leaves, spec = pytree.tree_flatten(value)
        if spec != self.spec:
            raise self._broken("structure", self.spec, spec)
        tensors = []
        for leaf, agreed in zip(leaves, self.leaves, strict=True):
            if isinstance(agreed, TensorLeaf):
                expected = (agreed.value.shape_of(rows), agreed.value.dtype)
                came = (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf
                if came != expected:
                    raise self._broken("tensor", expected, came)
                tensors.append(leaf)
            elif isinstance(agreed, AliasLeaf) and leaf is not leaves[agreed.leaf]:
                raise self._broken("tensor", f"the one at place {agreed.leaf} again", "another one")
            elif isinstance(agreed, ConstantLeaf) and not _same(leaf, agreed.of(rows)):
                raise self._broken("value", agreed.of(rows), leaf)
        return tensors

    def join(self, tensors: Sequence[Tensor], rows: int) -> Any:
        """Build the boundary's value from the tensors that travelled: the inverse of `split`."""
        given = iter(tensors)
        leaves: list[Any] = []
        for leaf in self.leaves:
            if isinstance(leaf, TensorLeaf):
                leaves.append(next(given))
            else:
                leaves.append(leaves[leaf.leaf] if isinstance(leaf, AliasLeaf) else leaf.of(rows))
        return pytree.tree_unflatten(leaves, self.spec)

    def _broken(self, what: str, expected: object, came: object) -> ModelError:
        """Make the error that names this boundary, what was agreed on and what came instead."""
        return ModelError(
            f"{self.where}: the {what} that crosses this boundary was {_show(expected)} on the sample batch and is now "
            f"{_show(came)}; a boundary may change with the number of rows only (and with the length, where the trainer has "
            "a length_axis), so pad the data or cut the model elsewhere"
        )


def observe(
    where: str,
    few: Any,
    more: Any,
    gradients: tuple[Sequence[Tensor | None], Sequence[Tensor | None]] | None = None,
) -> Contract:
    """Derive a boundary's contract from its value at `FEW` rows and at `MORE` rows.

    `gradients` holds, for both numbers of rows, the gradient that came back for each distinct tensor in order (default: the
    boundary is never run backward). Raises `ModelError` when the two values differ in more than their rows.
    """
    few_leaves, spec = pytree.tree_flatten(few)
    more_leaves, more_spec = pytree.tree_flatten(more)
    if spec != more_spec:
        raise ModelError(f"{where}: the structure changes with the number of rows: {spec} and {more_spec}")
    leaves: list[Leaf] = []
    first_seen: dict[int, int] = {}  # a tensor's id -> its first leaf
    for a, b in zip(few_leaves, more_leaves, strict=True):
        if not isinstance(a, Tensor):
            leaves.append(_constant(where, a, b))
            continue
        _check_alike(where, a, b)
        if id(a) in first_seen:
            leaves.append(AliasLeaf(first_seen[id(a)]))
        else:
            back = [side[len(first_seen)] for side in gradients] if gradients else []
            first_seen[id(a)] = len(leaves)
            leaves.append(_tensor(where, a, b, back))
    return Contract(where, spec, tuple(leaves))


def _constant(where: str, few: Any, more: Any) -> ConstantLeaf:
    """Agree on a leaf that is no tensor."""
    if isinstance(few, int) and isinstance(more, int) and few != more:
        return ConstantLeaf(LinearInRows.between(few, more))
    if _same(few, more):
        return ConstantLeaf(few)
    raise ModelError(f"{where}: {_show(few)} is no tensor and changes with the rows, to {_show(more)}; pass a tensor")


def _check_alike(where: str, few: Tensor, more: Any) -> None:
    """Refuse a tensor whose kind, type or number of axes changes with the rows."""
    if not isinstance(more, Tensor):
        raise ModelError(f"{where}: a tensor changes to {_show(more)} with the number of rows")
    if few.dim() != more.dim() or few.dtype != more.dtype:
        raise ModelError(
            f"{where}: a tensor changes from {few.dtype} {tuple(few.shape)} to {more.dtype} {tuple(more.shape)}"
        )


def _tensor(where: str, few: Tensor, more: Tensor, gradients: Sequence[Tensor | None]) -> TensorLeaf:
    """Agree on a leaf that travels. `gradients`: those that came back at both numbers of rows; none without a backward."""
    came = [gradient for gradient in gradients if gradient is not None]
    if len(came) == 1:
        raise ModelError(f"{where}: a tensor gets a gradient for {FEW} rows or for {MORE}, but not for both")
    tracked = bool(gradients) and more.requires_grad
    return TensorLeaf(TensorForm.between(few, more), tracked, TensorForm.between(*came) if came else None)


def _same(a: Any, b: Any) -> bool:
    """Whether two leaves that are no tensors are equal."""
    if type(a) is not type(b):
        return False
    try:
        return bool(a == b)
    except (TypeError, ValueError, RuntimeError):  # arrays and the like, whose == gives no truth
        return a is b


def _show(value: object) -> str:
    """Write a leaf for a message; a tensor is given as (shape, type)."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], torch.dtype):
        return f"{str(value[1]).removeprefix('torch.')} {value[0]}"
    return repr(value)
