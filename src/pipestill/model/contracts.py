"""What crosses a boundary: the shapes, constants and gradients that both of its sides agree on beforehand.

A boundary's value is any nest of tuples, lists, dicts and registered classes over tensors and other values. Its
`Contract` is learnt from running a few rows twice, with 2 and with 3 of them: what differs scales with the rows,
what does not is fixed. Sender and receiver then only exchange tensors. They arrive with the strides they had: sums
in another order of memory differ in their last bits.
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
    """A tensor that travels. `gradient`: the form of the gradient that comes back for it, if any does.

    `tracked`: it carries a graph; only with one may a gradient come back.
    """

    value: TensorForm
    tracked: bool
    gradient: TensorForm | None


@dataclass(frozen=True, slots=True)
class AliasLeaf:
    """The same tensor as an earlier leaf; it travels once."""

    leaf: int


@dataclass(frozen=True, slots=True)
class ConstantLeaf:
    """Not a tensor: the same on both sides, or a number that follows from the rows. It does not travel."""

    value: Any

    def of(self, rows: int) -> Any:
        return self.value.of(rows) if isinstance(self.value, LinearInRows) else self.value


@dataclass(frozen=True)
class Contract:
    """What a boundary's value is made of, for any number of rows. `where` names it in messages."""

    where: str
    spec: Any
    leaves: tuple[TensorLeaf | AliasLeaf | ConstantLeaf, ...]

    @cached_property
    def tensor_leaves(self) -> list[TensorLeaf]:
        """The leaves that travel."""
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorLeaf)]

    @cached_property
    def values(self) -> list[TensorForm]:
        """The forms of what travels forward."""
        return [leaf.value for leaf in self.tensor_leaves]

    @cached_property
    def gradients(self) -> list[TensorForm]:
        """The forms of what travels back."""
        return [leaf.gradient for leaf in self.tensor_leaves if leaf.gradient is not None]

    @cached_property
    def gradient_positions(self) -> list[int]:
        """Which of the travelling tensors get a gradient back, by position."""
        return [i for i, leaf in enumerate(self.tensor_leaves) if leaf.gradient is not None]

    @cached_property
    def tracked_positions(self) -> list[int]:
        """Which of the travelling tensors carry a graph, by position."""
        return [i for i, leaf in enumerate(self.tensor_leaves) if leaf.tracked]

    def num_bytes(self, rows: int) -> int:
        """Bytes of everything that travels forward."""
        return sum(torch.Size(form.shape_of(rows)).numel() * form.dtype.itemsize for form in self.values)

    def split(self, value: Any, rows: int) -> list[Tensor]:
        """The tensors of `value` that travel, in order; `ModelError` when it breaks the contract."""
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
        """The value whose travelling tensors are `tensors`."""
        given = iter(tensors)
        leaves: list[Any] = []
        for leaf in self.leaves:
            if isinstance(leaf, TensorLeaf):
                leaves.append(next(given))
            else:
                leaves.append(leaves[leaf.leaf] if isinstance(leaf, AliasLeaf) else leaf.of(rows))
        return pytree.tree_unflatten(leaves, self.spec)

    def _broken(self, what: str, expected: object, came: object) -> ModelError:
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
    """The contract of a boundary from its value at `FEW` and at `MORE` rows.

    `gradients` holds what came back for each distinct tensor in order, at both numbers of rows (default: nothing did).
    Raises `ModelError` when the two differ in more than their rows.
    """
    few_leaves, spec = pytree.tree_flatten(few)
    more_leaves, more_spec = pytree.tree_flatten(more)
    if spec != more_spec:
        raise ModelError(f"{where}: the structure changes with the number of rows: {spec} and {more_spec}")
    leaves: list[TensorLeaf | AliasLeaf | ConstantLeaf] = []
    first_seen: dict[int, int] = {}
    for a, b in zip(few_leaves, more_leaves, strict=True):
        if isinstance(a, Tensor):
            if not isinstance(b, Tensor):
                raise ModelError(f"{where}: a tensor changes to {_show(b)} with the number of rows")
            if a.dim() != b.dim() or a.dtype != b.dtype:
                raise ModelError(
                    f"{where}: a tensor changes from {a.dtype} {tuple(a.shape)} to {b.dtype} {tuple(b.shape)}"
                )
            if id(a) in first_seen:
                leaves.append(AliasLeaf(first_seen[id(a)]))
                continue
            place = len(first_seen)
            first_seen[id(a)] = len(leaves)
            back = [side[place] for side in gradients] if gradients else []
            came = [gradient for gradient in back if gradient is not None]
            if len(came) == 1:
                raise ModelError(f"{where}: a tensor gets a gradient for {FEW} rows or for {MORE}, but not for both")
            gradient = TensorForm.between(*came) if came else None
            leaves.append(TensorLeaf(TensorForm.between(a, b), bool(gradients) and b.requires_grad, gradient))
        elif isinstance(a, int) and isinstance(b, int) and a != b:
            leaves.append(ConstantLeaf(LinearInRows.between(a, b)))
        elif _same(a, b):
            leaves.append(ConstantLeaf(a))
        else:
            raise ModelError(
                f"{where}: {_show(a)} is no tensor and changes with the rows, to {_show(b)}; pass a tensor"
            )
    return Contract(where, spec, tuple(leaves))


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    try:
        return bool(a == b)
    except (TypeError, ValueError, RuntimeError):  # arrays and the like, whose == gives no truth
        return a is b


def _show(value: object) -> str:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], torch.dtype):
        return f"{str(value[1]).removeprefix('torch.')} {value[0]}"
    return repr(value)
