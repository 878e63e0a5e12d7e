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

from pipestill.errors import DataError, ModelError

FEW, MORE = 2, 3


@dataclass(frozen=True, slots=True)
class Scaled:
    """A whole number that is `per_row` * rows + `fixed`."""

    per_row: int
    fixed: int

    @classmethod
    def between(cls, few: int, more: int) -> Scaled:
        per_row = (more - few) // (MORE - FEW)
        return cls(per_row, few - per_row * FEW)

    def of(self, rows: int) -> int:
        return self.per_row * rows + self.fixed


@dataclass(frozen=True, slots=True)
class Form:
    """Shape, type and strides of a tensor that travels, for any number of rows. A stride of 0 repeats one slice.

    `lasting`: it is the same memory every time, such as a buffer, which the next forward may write to.
    """

    shape: tuple[Scaled, ...]
    dtype: torch.dtype
    strides: tuple[Scaled, ...]
    lasting: bool

    @classmethod
    def between(cls, few: Tensor, more: Tensor) -> Form:
        """What two tensors, of `FEW` and of `MORE` rows, have in common."""
        shape = tuple(Scaled.between(a, b) for a, b in zip(few.shape, more.shape, strict=True))
        strides = tuple(Scaled.between(a, b) for a, b in zip(few.stride(), more.stride(), strict=True))
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


@dataclass(frozen=True, slots=True)
class TensorLeaf:
    """A tensor that travels. `gradient`: the form of the gradient that comes back for it, if any does.

    `tracked`: it carries a graph; only with one may a gradient come back.
    """

    value: Form
    tracked: bool
    gradient: Form | None


@dataclass(frozen=True, slots=True)
class AliasLeaf:
    """The same tensor as an earlier leaf; it travels once."""

    leaf: int


@dataclass(frozen=True, slots=True)
class ConstantLeaf:
    """Not a tensor: the same on both sides, or a number that follows from the rows. It does not travel."""

    value: Any

    def of(self, rows: int) -> Any:
        return self.value.of(rows) if isinstance(self.value, Scaled) else self.value


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
    def values(self) -> list[Form]:
        """The forms of what travels forward."""
        return [leaf.value for leaf in self.tensor_leaves]

    @cached_property
    def gradients(self) -> list[Form]:
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


def learn(
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
            gradient = Form.between(*came) if came else None
            leaves.append(TensorLeaf(Form.between(a, b), bool(gradients) and b.requires_grad, gradient))
        elif isinstance(a, int) and isinstance(b, int) and a != b:
            leaves.append(ConstantLeaf(Scaled.between(a, b)))
        elif _same(a, b):
            leaves.append(ConstantLeaf(a))
        else:
            raise ModelError(
                f"{where}: {_show(a)} is no tensor and changes with the rows, to {_show(b)}; pass a tensor"
            )
    return Contract(where, spec, tuple(leaves))


def distinct_tensors(value: Any) -> list[Tensor]:
    """The tensors of a nest, each once, in order."""
    return list({id(leaf): leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}.values())


class _Enter(torch.autograd.Function):
    """Starts a graph at given values, and hands out the gradients that reach it as they are.

    Leaves of autograd would do for most models, but refuse to be written to in place and keep their gradients in
    their own order of memory instead of in the one that they came in.
    """

    @staticmethod
    def forward(ctx: Any, start: Tensor, gradients: list[Tensor | None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.gradients[:] = gradients
        return (None, None, *(None for _ in gradients))


def enter(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Where a graph is cut: the same tensors as the start of a new one, and a list that its backward fills.

    After the backward, the list holds the gradient of each tensor, or None for one that was not used.
    """
    gradients: list[Tensor | None] = [None] * len(tensors)
    if not tensors:
        return [], gradients
    start = torch.zeros((), requires_grad=True)
    entered = _Enter.apply(start, gradients, *(tensor.detach() for tensor in tensors))  # type: ignore[no-untyped-call]
    return list(entered), gradients


def detached(value: Any) -> tuple[Any, list[Tensor], list[Tensor | None]]:
    """The same nest (aliases kept) as the start of a new graph; its tensors that carry the old one; their gradients.

    The backward of the new graph fills the last list (see `enter`).
    """
    tracked = [tensor for tensor in distinct_tensors(value) if tensor.requires_grad]
    entered, gradients = enter(tracked)
    fresh = {id(old): new for old, new in zip(tracked, entered, strict=True)}
    return pytree.tree_map_only(Tensor, lambda t: fresh.get(id(t), t), value), tracked, gradients


def num_rows(value: Any, what: str) -> int:
    """The length of the first axis, which every tensor of a batch shares; `DataError` when they do not."""
    sizes = {leaf.shape[0] if leaf.dim() else None for leaf in distinct_tensors(value)}
    if not sizes:
        kinds = sorted({type(leaf).__name__ for leaf in pytree.tree_leaves(value)})
        raise DataError(f"{what}: expected tensors whose first axis counts samples, got no tensor ({', '.join(kinds)})")
    if any(leaf.layout is not torch.strided for leaf in distinct_tensors(value)):
        raise DataError(f"{what}: expected dense tensors, got a sparse one; make it dense (to_dense())")
    if len(sizes) != 1 or None in sizes:
        raise DataError(
            f"{what}: every tensor's first axis must count the same samples, "
            f"got shapes {[tuple(t.shape) for t in distinct_tensors(value)]}"
        )
    rows = sizes.pop()
    assert rows is not None
    return rows


def rows_of(value: Any, index: slice | Tensor) -> Any:
    """The same nest with only some rows of every tensor."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[index], value)


def copied(value: Any) -> Any:
    """The same nest (aliases kept) over copies of its tensors."""
    copies = {id(t): t.clone().pin_memory() if t.is_pinned() else t.clone() for t in distinct_tensors(value)}
    return pytree.tree_map_only(Tensor, lambda tensor: copies[id(tensor)], value)


def to_device(value: Any, device: torch.device) -> Any:
    """The same nest with every tensor on `device`."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), value)


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
