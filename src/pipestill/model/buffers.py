"""Finds buffers that one block's forward writes and another block uses: in another stage that one would see an old copy."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pipestill.errors import ModelError
from pipestill.model.blocks import BlockModel
from pipestill.model.nests import copied, memory_of


@dataclass(frozen=True, slots=True)
class SharedBuffer:
    """A buffer that one block's forward writes and another block's forward reads or writes."""

    role: str
    """The model that it is of, "student" or "teacher"."""
    name: str
    writer: int
    """The block that writes it."""
    user: int
    """The other block."""


class _Used(TorchDispatchMode):
    """A context that notes the memory of all tensors that operators in it are given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory = set[int]()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator and note what it is given."""
        self.memory.update(memory_of(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


def written_buffers(model: BlockModel, before: Mapping[str, tuple[Tensor, Tensor]]) -> set[str]:
    """The names of those buffers in `before` that were written or replaced since `held_buffers` gave it.

    Contents are compared: batch norms write to their statistics without a trace in the tensors' versions.
    """
    now = dict(model.model.named_buffers(remove_duplicate=False))
    return {name for name, (buffer, content) in before.items() if now.get(name) is not buffer or not _equal(buffer, content)}


def held_buffers(model: BlockModel, names: Collection[str] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Each buffer of these names (default: every buffer), under all of its names, with a copy of its content."""
    buffers = model.model.named_buffers(remove_duplicate=False)
    return {name: (buffer, buffer.detach().clone()) for name, buffer in buffers if names is None or name in names}


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one form are equal, NaN where NaN is."""
    return bool(((one == other) | ((one != one) & (other != other))).all())


def shared_buffers(role: str, model: BlockModel, inputs: Any) -> tuple[SharedBuffer, ...]:
    """Run a model's blocks on a few rows, in the mode that it is in, and find its shared buffers; call it in `untouched`."""
    held = held_buffers(model)
    written: list[set[str]] = []
    used: list[set[str]] = []
    value = inputs
    with torch.no_grad():
        for block in model.blocks if held else ():
            given = copied(value)  # a buffer that travels as a value is another tensor there
            memory = {name: memory_of(buffer) for name, buffer in model.model.named_buffers(remove_duplicate=False)}
            try:
                with _Used() as operators:
                    value = block.call(given)
            except Exception:  # what runs without this context and not in it: nothing can be told
                return ()
            touched = {name for name, key in memory.items() if key in operators.memory}
            written.append(written_buffers(model, {name: pair for name, pair in held.items() if name in touched}))
            now = dict(model.model.named_buffers(remove_duplicate=False))
            written[-1] |= {name for name, buffer in now.items() if name not in held or held[name][0] is not buffer}
            used.append(touched | written[-1])
            held |= held_buffers(model, written[-1])
    return tuple(
        SharedBuffer(role, name, writer, user)
        for writer, names in enumerate(written)
        for name in sorted(names)
        for user in range(len(used))
        if user != writer and name in used[user]
    )


def check_buffers(model: BlockModel, shared: Sequence[SharedBuffer], stages: Sequence[range]) -> None:
    """Raise `ModelError` where a shared buffer's blocks are in two of the stages, each a range of block numbers."""
    stage_of = {block: stage for stage, blocks in enumerate(stages) for block in blocks}
    for buffer in shared:
        first, second = stage_of[buffer.writer], stage_of[buffer.user]
        if first != second:
            writer, user = (f"block {i} ('{model.blocks[i].name}')" for i in (buffer.writer, buffer.user))
            raise ModelError(
                f"buffer '{buffer.name}' is written by {buffer.role} {writer} and used by {user}, in stages {first} and "
                f"{second}: the latter would see an old copy. Choose a partition that keeps both blocks in one stage, or pass "
                "the tensor on as part of the value between blocks"
            )
