"""Trained weights that several blocks have, such as the embeddings of a language model that are its output layer too.

Each block adds up gradients of its own, and once a step these are added to each other, in the order of the blocks:

    stage 0:   embeddings   gradient of block 0  ---+--->  sum of both, update
                                                    X
    stage 1:   head         gradient of block 5  ---+--->  sum of both, update

So the sum does not depend on which stages the blocks are in. Every stage makes the same update of its copy, with the same state
of the optimizer, and the copies stay alike. `reference` does the same in one place.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipestill.model.blocks import BlockModel


def tied_blocks(model: BlockModel) -> dict[str, tuple[int, ...]]:
    """The blocks of each trained parameter that several blocks use, by its name."""
    users: dict[str, list[int]] = {}
    for block in range(len(model)):
        for name, parameter in model.parameters_of(range(block, block + 1)).items():
            if parameter.requires_grad:
                users.setdefault(name, []).append(block)
    return {name: tuple(blocks) for name, blocks in users.items() if len(blocks) > 1}


def gradient_forms(model: BlockModel, blocks: range) -> list[tuple[torch.Size, torch.dtype]]:
    """Shape and type of each gradient of tied weights that a stage of these blocks has (see `TiedWeights.gradients`)."""
    weights = [model.model.get_parameter(name) for name, _ in _gradient_keys(model, blocks)]
    return [(weight.shape, weight.dtype) for weight in weights]


def _gradient_keys(model: BlockModel, blocks: range) -> list[tuple[str, int]]:
    """The weight and the block of each of these gradients."""
    return [(name, block) for name, users in tied_blocks(model).items() for block in users if block in blocks]


def counted_once(model: BlockModel, stages: Sequence[range]) -> list[list[nn.Parameter]]:
    """The parameters of each stage, each in the first stage that has it."""
    seen = set[int]()
    counted = []
    for stage in stages:
        counted.append([p for p in model.parameters_of(stage).values() if id(p) not in seen or not p.requires_grad])
        seen |= {id(p) for p in counted[-1]}
    return counted


@dataclass(frozen=True)
class _Tied:
    """One tied parameter in one stage."""

    original: nn.Parameter
    weight: nn.Parameter
    """What this stage trains: the parameter itself, or a copy where an earlier stage trains the parameter."""
    users: tuple[int, ...]
    """All blocks that use it."""
    leaves: Mapping[int, nn.Parameter]
    """By block of this stage that uses it: what stands in the parameter's place in the block, with a gradient of its own."""
    places: tuple[tuple[nn.Module, str], ...]
    """Where the parameter is in the model."""


class TiedWeights:
    """The tied weights of a student's stage."""

    def __init__(self, model: BlockModel, blocks: range) -> None:
        self._model = model
        self._blocks = blocks
        self._tied = {
            name: self._of(model, name, users) for name, users in tied_blocks(model).items() if set(users) & set(blocks)
        }
        self._inside: list[_Tied] = []
        """Those in whose places a block's leaves are now."""

    def _of(self, model: BlockModel, name: str, users: tuple[int, ...]) -> _Tied:
        """What a stage has of one tied parameter."""
        original = model.model.get_parameter(name)
        own = users[0] in self._blocks
        weight = original if own else nn.Parameter(original.detach().clone())
        leaves = {block: nn.Parameter(weight.detach()) for block in users if block in self._blocks}
        places = [(m, key) for m in model.model.modules() for key, p in m._parameters.items() if p is original]
        return _Tied(original, weight, users, leaves, tuple(places))

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """What this stage trains, by name."""
        return {name: tied.weight for name, tied in self._tied.items()}

    @property
    def counted_elsewhere(self) -> set[str]:
        """The names of those whose gradient counts in the norm of another stage, that of the first block that uses them."""
        return {name for name, tied in self._tied.items() if tied.users[0] not in self._blocks}

    def enter(self, block: int) -> None:
        """Have a block's own leaves in the model from now on; called just before each block."""
        self.leave()
        for tied in self._tied.values():
            if block in tied.leaves:
                leaf = tied.leaves[block]
                leaf.data = tied.weight.data  # the same memory, wherever it was moved
                for module, key in tied.places:
                    module._parameters[key] = leaf
                self._inside.append(tied)

    def leave(self) -> None:
        """Put the parameters back."""
        for tied in self._inside:
            for module, key in tied.places:
                module._parameters[key] = tied.original
        self._inside.clear()

    @contextmanager
    def of(self, block: int) -> Iterator[None]:
        """Have a block's own leaves in the model, in the body."""
        self.enter(block)
        try:
            yield
        finally:
            self.leave()

    def gradients(self) -> list[Tensor]:
        """The gradients that the blocks of this stage have added up, weight by weight; zeros where there is none."""
        leaves = [leaf for tied in self._tied.values() for leaf in tied.leaves.values()]
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]

    def add_up(self, given: Mapping[range, Sequence[Tensor]]) -> None:
        """Give each weight the sum of its gradients. `given`: by the blocks of each stage, what `gradients` gave there."""
        by_block: dict[tuple[str, int], Tensor] = {}
        for blocks, gradients in given.items():
            by_block |= dict(zip(_gradient_keys(self._model, blocks), gradients, strict=True))
        for name, tied in self._tied.items():
            first, *others = (by_block[name, block] for block in tied.users)
            total = first.clone()
            for gradient in others:
                total += gradient
            tied.weight.grad = total
            for leaf in tied.leaves.values():
                leaf.grad = None

    def end(self) -> None:
        """Give the model what this stage has trained."""
        for tied in self._tied.values():
            if tied.weight is not tied.original:
                with torch.no_grad():
                    tied.original.data.copy_(tied.weight.data)
