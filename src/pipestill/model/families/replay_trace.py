"""Finds out, from one replay of a whole model and then one of each block, what has to travel and which block owns what."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pipestill.model.families.replay_layers import Layout
from pipestill.model.families.replay_marks import RANDOM, Marks
from pipestill.model.families.replay_run import Crossing, Like, Observer, Outline, Shaped

_WEIGHTS = "weights"
_ELSEWHERE = "elsewhere"


@dataclass
class Trace(Observer):
    """Watches one replay in which all layers are live, with the marks of whatever depends on weights."""

    layout: Layout
    marks: Marks
    block: int = 0
    used: dict[int, set[str]] = field(default_factory=dict)
    """By block: the names of tensors beside the layers that it read."""
    crossings: dict[int, tuple[tuple[int, ...], Any, tuple[Any, ...]]] = field(default_factory=dict)
    """By block: the fields of a `Crossing` but its inputs."""
    outlines: list[Outline] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, layout: Layout) -> "Trace":
        """The trace of a model, before its replay."""
        marks = Marks()
        marks.mark(model.parameters(), {_WEIGHTS})
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not layout.is_layer(name):
                marks.watch(name, tensor)
        return cls(layout, marks)

    def end(self) -> None:
        """What was read since the last block began belongs to it."""
        self.used.setdefault(self.block, set()).update(self.marks.seen)
        self.marks.seen.clear()

    def entered(self, block: int) -> None:
        """A block begins, and the one before it has ended."""
        self.end()
        self.block = block

    def called(self, layer: int, leaves: list[Any]) -> None:
        """Those of a layer's arguments travel that depend on weights."""
        self.crossings[self.layout.block_of_layer[layer] - 1] = (self._hidden_first(leaves, {_WEIGHTS, RANDOM}), None, ())

    def called_beside(self, output: Any) -> None:
        """What a module with weights gave is a placeholder elsewhere, even where it does not depend on the weights."""
        self.marks.mark((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)), {_WEIGHTS})

    def returned(self, layer: int, given: list[Any], leaves: list[Any], spec: Any) -> None:
        """All tensors of the last layer's output travel."""
        self.called_beside(leaves)
        outline = []
        for leaf in leaves:
            alike = [i for i, a in enumerate(given) if isinstance(a, Tensor) and isinstance(leaf, Tensor) and _same_form(a, leaf)]
            shaped = Shaped(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf
            outline.append(Like(alike[0]) if alike else shaped)
        self.outlines.append(Outline(spec, tuple(outline)))
        if layer in self.layout.last_of_list:
            rest = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
            self.crossings[self.layout.block_of_layer[layer]] = (self._hidden_first(leaves, None), spec, rest)

    def _hidden_first(self, leaves: list[Any], marks: set[str] | None) -> tuple[int, ...]:
        """The places of the tensors with one of the marks, the first one with a point before the others."""
        places = [
            i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and (marks is None or self.marks.of(leaf) & marks)
        ]
        floats = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        hidden = next((i for i in floats if i in places), floats[0])  # embeddings that are given depend on no weight
        return (hidden, *(i for i in places if i != hidden))


def _same_form(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and type."""
    return one.shape == other.shape and one.dtype == other.dtype


@dataclass
class Lookout(Observer):
    """Watches the replay of one block, and marks what comes of other blocks' weights and of placeholders."""

    marks: Marks

    @classmethod
    def of(cls, model: nn.Module, own: set[str], inputs: Mapping[str, Tensor]) -> "Lookout":
        """The lookout of a block that owns the parameters of these names. `inputs`: those to be told apart."""
        marks = Marks()
        owned = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in own}
        marks.mark((p for p in model.parameters() if id(p) not in owned), {_ELSEWHERE})
        for name, tensor in inputs.items():
            marks.mark([tensor], {name})
        return cls(marks)

    def skipped(self, tensors: list[Tensor]) -> None:
        """What comes of placeholders may not go on."""
        self.marks.mark(tensors, {_ELSEWHERE})

    def from_elsewhere(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on what this block does not have."""
        return _ELSEWHERE in self.marks.of(tensor)

    def inputs_of(self, tensors: list[Tensor]) -> set[str]:
        """The names of the inputs that some of the tensors depend on."""
        return set[str]().union(*(self.marks.of(tensor) for tensor in tensors)) - {_ELSEWHERE, RANDOM}


def owners_of(model: nn.Module, layout: Layout, used: Mapping[int, set[str]]) -> dict[str, set[int]]:
    """The blocks that each parameter belongs to, by name.

    One of a layer belongs to its block. Others belong to the blocks that read them, and one that nobody reads to the block of its
    nearest relative.
    """
    names: dict[int, list[str]] = {id(p): [] for p in model.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    owners: dict[str, set[int]] = {}
    for aliases in names.values():
        blocks = {block for block, seen in used.items() if any(name in seen for name in aliases)}
        for name in aliases:
            blocks |= {layout.block_of_layer[i] for i, layer in enumerate(layout.layers) if name.startswith(f"{layer}.")}
        for name in aliases:
            owners[name] = blocks
    for name, blocks in owners.items():
        if not blocks:
            owners[name] = _of_relatives(name, owners) or {0}
    return owners


def _of_relatives(name: str, owners: Mapping[str, set[int]]) -> set[int]:
    """The last block that owns a parameter of the nearest module around this one that has any."""
    prefix = name
    while "." in prefix:
        prefix = prefix.rpartition(".")[0]
        blocks = [b for other, of in owners.items() if other.startswith(f"{prefix}.") for b in of]
        if blocks:
            return {min(blocks)}
    return set()


def uses_of(model: nn.Module, layout: Layout, owners: Mapping[str, set[int]]) -> list[tuple[str, ...]]:
    """What each block uses: names of whole modules where it owns all of their parameters, else of parameters.

    Buffers beside the layers, of modules without parameters, belong to every block: each makes masks and rotary embeddings anew.
    """
    shared = [*_buffers_beside(model, "", layout)]
    return [(*_owned(model, "", layout, owners, block), *shared) for block in range(len(layout.block_names))]


def _owned(module: nn.Module, name: str, layout: Layout, owners: Mapping[str, set[int]], block: int) -> Iterator[str]:
    """The names of what a block owns in a module."""
    inside = [(n, owners[_join(name, n)]) for n, _ in module.named_parameters(remove_duplicate=False)]
    if not layout.holds_layer(name) and inside and all(block in of for _, of in inside):
        yield name
        return
    for own, of in inside:
        if "." not in own and block in of:
            yield _join(name, own)
    for child_name, child in module.named_children():
        if any(block in of for own, of in inside if own.startswith(f"{child_name}.")):
            yield from _owned(child, _join(name, child_name), layout, owners, block)


def _buffers_beside(module: nn.Module, name: str, layout: Layout) -> Iterator[str]:
    """The names of the buffers that no module with parameters holds, unless it holds layers too."""
    if layout.is_layer(name) or (not layout.holds_layer(name) and next(module.parameters(), None) is not None):
        return
    yield from (_join(name, buffer) for buffer, _ in module.named_buffers(recurse=False))
    for child_name, child in module.named_children():
        yield from _buffers_beside(child, _join(name, child_name), layout)


def _join(prefix: str, name: str) -> str:
    """The name of what lies in a module."""
    return f"{prefix}.{name}" if prefix else name


def module_owners(model: nn.Module, layout: Layout, owners: Mapping[str, set[int]]) -> dict[int, frozenset[int]]:
    """The blocks that the parameters of each module beside the layers belong to, by the module's id."""
    return {
        id(module): frozenset[int]().union(*(owners[_join(name, n)] for n, _ in module.named_parameters(remove_duplicate=False)))
        for name, module in model.named_modules(remove_duplicate=False)
        if not layout.holds_layer(name) and not layout.is_layer(name)
    }


def crossings_of(trace: Trace, needed: list[set[str]]) -> tuple[Crossing, ...]:
    """The crossing after each block but the last. `needed`: the inputs that each block reads."""
    return tuple(
        Crossing(*trace.crossings[block], frozenset[str]().union(*needed[block + 1 :])) for block in range(len(needed) - 1)
    )
