"""Contracts of boundaries: the structure, constants, tensor forms and gradients that both sides of one agree on beforehand.

A boundary's value is a nest of tensors and other values. Its `Contract` is observed by running a few rows twice, 2 of them and
then 3: what differs grows with the rows, what does not is fixed. Sender and receiver then exchange tensors and nothing else.
Tensors arrive with the strides they had: sums in another order of memory differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pipestill.errors import ModelError

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
            elif isinstance(agreed, ConstantLeaf) and not same(leaf, agreed.of(rows)):
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
    where: str, few: Any, more: Any, gradients: tuple[Sequence[Tensor | None], Sequence[Tensor | None]] | None = None
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
    if not isinstance(few, nn.Module) and (inside := _tensors_in(few)):
        raise ModelError(
            f"{where}: an object of class {type(few).__name__} holds tensors ({', '.join(inside[:5])}), and PyTorch does not "
            "know how to take it apart; pass its tensors on in a tuple or dict, or, where the class is a dataclass, call "
            f"torch.export.register_dataclass({type(few).__name__}) once, before training, in every process"
        )
    if same(few, more):
        return ConstantLeaf(few)
    raise ModelError(f"{where}: {_show(few)} is no tensor and changes with the rows, to {_show(more)}; pass a tensor")


def _check_alike(where: str, few: Tensor, more: Any) -> None:
    """Refuse a tensor whose kind, type or number of axes changes with the rows."""
    if not isinstance(more, Tensor):
        raise ModelError(f"{where}: a tensor changes to {_show(more)} with the number of rows")
    if few.dim() != more.dim() or few.dtype != more.dtype:
        raise ModelError(f"{where}: a tensor changes from {few.dtype} {tuple(few.shape)} to {more.dtype} {tuple(more.shape)}")


def _tensor(where: str, few: Tensor, more: Tensor, gradients: Sequence[Tensor | None]) -> TensorLeaf:
    """Agree on a leaf that travels. `gradients`: those that came back at both numbers of rows; none without a backward."""
    came = [gradient for gradient in gradients if gradient is not None]
    if len(came) == 1:
        raise ModelError(f"{where}: a tensor gets a gradient for {FEW} rows or for {MORE}, but not for both")
    tracked = bool(gradients) and more.requires_grad
    return TensorLeaf(TensorForm.between(few, more), tracked, TensorForm.between(*came) if came else None)


def same(a: Any, b: Any) -> bool:
    """Whether two leaves that are no tensors are equal."""
    if type(a) is not type(b):
        return False
    if a is b:
        return True
    try:
        equal = bool(a == b)
    except (TypeError, ValueError, RuntimeError):  # arrays and the like, whose == gives no truth
        return False
    mine, others = (getattr(value, "__dict__", None) for value in (a, b))
    if not equal or mine is None or others is None:
        return equal
    try:  # an == may say too little, such as always True
        return mine.keys() == others.keys() and all(same(mine[name], others[name]) for name in mine)
    except RecursionError:  # objects that know each other
        return equal


def _tensors_in(value: Any) -> list[str]:
    """The attributes of an object that are tensors, or lists and dicts of some."""
    attributes = getattr(value, "__dict__", None)
    if attributes is None and hasattr(value, "__slots__"):
        attributes = {name: getattr(value, name, None) for name in value.__slots__}
    if not isinstance(attributes, dict) or isinstance(value, type):
        return []
    return [str(name) for name, inside in attributes.items() if any(isinstance(x, Tensor) for x in pytree.tree_leaves(inside))]


def _show(value: object) -> str:
    """Write a leaf for a message; a tensor is given as (shape, type)."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], torch.dtype):
        return f"{str(value[1]).removeprefix('torch.')} {value[0]}"
    return repr(value)
