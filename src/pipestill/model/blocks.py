"""Any `nn.Module` -> ordered blocks that keep the names of the unsplit model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pipestill.arguments import shown
from pipestill.errors import ModelError, nearest
from pipestill.model.block import Block
from pipestill.model.families.registry import known_blocks


class BlockModel:
    """A model together with its ordered blocks. The model itself stays whole; its state dict is never renamed.

    `cuts` lists the blocks in order: names of submodules that each take the value of the one before, or `Block`s for
    anything else. Without cuts, an `nn.Sequential` is cut at every child (nested ones too), a model of a known family
    (see `families`) at its layers, and any other is asked for `pipeline_blocks()`, which returns such a list. Raises
    `ModelError` when there is none, when a name is unknown, or when a parameter belongs to no block.
    """

    def __init__(self, model: nn.Module, cuts: Sequence[str | Block] | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(f"the model is {shown(model)}; expected an nn.Module")
        if cuts is not None and (isinstance(cuts, str) or not isinstance(cuts, Sequence)):
            raise ModelError(f"cuts is {shown(cuts)}; expected a list of names of submodules, or of Blocks")
        lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
        if lazy:
            raise ModelError(
                f"{type(model).__name__} has no sizes yet of {', '.join(lazy[:5])}; call it once beforehand"
            )
        self.model = model
        self.blocks: tuple[Block, ...] = tuple(
            _block(model, cut) for cut in (_own_cuts(model) if cuts is None else cuts)
        )
        if not self.blocks:
            raise ModelError(f"{type(model).__name__} has no block; expected at least one")
        self.frozen_norms: Sequence[nn.Module] = ()
        """Layers that stay in eval mode while the model trains."""
        self._owned = [self._names_used(block) for block in self.blocks]
        owned = set[str]().union(*self._owned)
        left = [name for name, _ in self._named_tensors() if name not in owned]
        if left:
            raise ModelError(
                f"{type(model).__name__}: no block uses {', '.join(left[:5])}{' and more' if len(left) > 5 else ''}; "
                "name them in the `uses` of a Block, or cut the model so that every parameter is inside a block"
            )

    def __len__(self) -> int:
        return len(self.blocks)

    def _named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters(remove_duplicate=False)
        yield from self.model.named_buffers(remove_duplicate=False)

    def _names_used(self, block: Block) -> set[str]:
        """Every parameter and buffer that the block uses, under all the names it has."""
        mine = {
            id(tensor)
            for name, tensor in self._named_tensors()
            if any(not use or name == use or name.startswith(f"{use}.") for use in block.uses)
        }
        return {name for name, tensor in self._named_tensors() if id(tensor) in mine}

    def in_mode(self, train: bool) -> None:
        """Put the whole model in train or eval mode: containers and modules that stages share count too.

        Stages that take turns in one process may be in different modes, so each asks before it runs.
        """
        if self.model.training is not train:
            self.model.train(train)
            for layer in self.frozen_norms:
                layer.eval()

    def modules_of(self, blocks: range) -> list[nn.Module]:
        """The modules that consecutive blocks use, with all inside them."""
        uses = [use for i in blocks for use in self.blocks[i].uses]
        named = self.model.named_modules()
        return [m for name, m in named if any(not use or name == use or name.startswith(f"{use}.") for use in uses)]

    def parameters_of(self, blocks: range) -> dict[str, nn.Parameter]:
        """The parameters of consecutive blocks under their names in the unsplit model, in its order, once each."""
        owned = set[str]().union(*(self._owned[i] for i in blocks))
        return {name: p for name, p in self.model.named_parameters() if name in owned}

    def tensors_of(self, blocks: range) -> dict[str, Tensor]:
        """Parameters and buffers of consecutive blocks, once each: what moves between devices and ranks."""
        owned = set[str]().union(*(self._names_used(self.blocks[i]) for i in blocks))  # anew: a forward may add some
        return {**self.parameters_of(blocks), **{n: b for n, b in self.model.named_buffers() if n in owned}}

    def forms_of(self, blocks: range) -> dict[str, tuple[torch.Size, torch.dtype, bool]]:
        """Shape, type and whether it is a parameter, of each of `tensors_of`, under its name."""
        tensors = self.tensors_of(blocks).items()
        return {name: (tensor.shape, tensor.dtype, isinstance(tensor, nn.Parameter)) for name, tensor in tensors}

    def adopt(self, forms: Mapping[str, tuple[torch.Size, torch.dtype, bool]]) -> list[Tensor]:
        """The tensors of these names, to be filled with what another copy of this model has there.

        Buffers that are missing here, or of another form, are made anew: their owner may have replaced them. Raises
        `ModelError` where the parameters differ.
        """
        known = dict(self._named_tensors())
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for name, (shape, dtype, is_parameter) in forms.items():
            mine = known.get(name)
            if mine is not None and (mine.shape, mine.dtype) == (shape, dtype):
                continue
            module, _, buffer = name.rpartition(".")
            if is_parameter or isinstance(mine, nn.Parameter) or module not in modules:
                raise ModelError(
                    f"{type(self.model).__name__}: '{name}' is {dtype} {tuple(shape)} in another process and "
                    f"{'missing' if mine is None else f'{mine.dtype} {tuple(mine.shape)}'} in this one; "
                    "build the same model in every process"
                )
            known[name] = modules[module]._buffers[buffer] = torch.empty(shape, dtype=dtype)
        return [known[name].detach() for name in forms]

    def check_ties(self, stages: Sequence[range]) -> None:
        """Refuse a trained tensor that two stages would share (`ModelError`): their updates would drift apart."""
        owner: dict[int, tuple[int, str]] = {}
        for stage, blocks in enumerate(stages):
            for name, tensor in self.tensors_of(blocks).items():
                first, first_name = owner.setdefault(id(tensor), (stage, name))
                if first != stage:
                    raise ModelError(
                        f"'{name}' (also '{first_name}') is shared by student stages {first} and {stage}, and tied "
                        "weights cannot be trained in two stages; choose a partition that keeps both in one stage, or untie "
                        "them (a parameter each; for a Hugging Face model, config.tie_word_embeddings=False)"
                    )

    def __call__(self, value: Any) -> Any:
        """The whole model, block by block."""
        for block in self.blocks:
            value = block.call(value)
        return value


def _own_cuts(model: nn.Module) -> list[str | Block]:
    declared = getattr(model, "pipeline_blocks", None)
    if callable(declared):
        return list(declared())
    if type(model) is nn.Sequential:
        if model._forward_hooks or model._forward_pre_hooks:
            raise ModelError("the nn.Sequential has forward hooks, which its blocks alone would not call; remove them")
        return list(_sequential_names(model, ""))
    if (blocks := known_blocks(model)) is not None:
        return blocks
    raise ModelError(
        f"cannot tell the blocks of {type(model).__name__}: make it an nn.Sequential, give it a method "
        "pipeline_blocks() that returns the names of its consecutive submodules, or pass such a list as cuts"
    )


def _sequential_names(model: nn.Sequential, prefix: str) -> Iterator[str]:
    for name, child in model._modules.items():  # named_children() leaves out a module that comes a second time
        if type(child) is nn.Sequential and not child._forward_hooks and not child._forward_pre_hooks:
            yield from _sequential_names(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _block(model: nn.Module, cut: str | Block) -> Block:
    names = dict(model.named_modules(remove_duplicate=False))
    if isinstance(cut, Block):
        tensors = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        known = {*names, *(name for named in tensors for name, _ in named)}
        for use in cut.uses:
            if use not in known:
                raise ModelError(
                    f"block '{cut.name}' uses '{use}', which {type(model).__name__} lacks{nearest(use, known)}"
                )
        return cut
    if not isinstance(cut, str):
        raise ModelError(
            f"a cut of {type(model).__name__} is {shown(cut)}; expected the name of a submodule, or a Block"
        )
    if cut not in names:
        raise ModelError(f"cut '{cut}' is no submodule of {type(model).__name__}{nearest(cut, names)}")
    return Block(cut, names[cut], (cut,))


def ranges(partition: Sequence[int]) -> list[range]:
    """Stage sizes in blocks -> the range of block indices of every stage."""
    ends = [sum(partition[: i + 1]) for i in range(len(partition))]
    return [range(end - size, end) for end, size in zip(ends, partition, strict=True)]
