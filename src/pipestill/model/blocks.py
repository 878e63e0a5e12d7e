"""Cuts any `nn.Module` into ordered blocks, whose tensors keep the names of the unsplit model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pipestill.arguments import shown
from pipestill.errors import ModelError, nearest
from pipestill.model.block import Block, JointCall
from pipestill.model.families.image_models import image_model_blocks
from pipestill.model.families.language_models import language_model_blocks
from pipestill.model.families.replay import replay_blocks


class TensorState(NamedTuple):
    """What a process must know of a tensor that it will receive from another copy of the model."""

    shape: torch.Size
    dtype: torch.dtype
    is_parameter: bool


class BlockModel:
    """A model together with its ordered blocks. The model itself stays whole; the names in its state dict do not change.

    Without `cuts`, a model that has a method `pipeline_blocks()`, which returns such a list, is cut as that says; an
    `nn.Sequential` is cut at every child, nested ones too; and a model of `transformers` or of a known family (see
    `pipestill.model.families`) is cut at its layers.

    Args:
        model: the model, any `nn.Module` whose parameters have their sizes.
        cuts: the blocks in order. Each is the name of a submodule that takes the value of the block before, or a `Block` for
            anything else.

    Raises:
        ModelError: no blocks are known, a name is unknown, or a parameter or buffer belongs to no block.
    """

    def __init__(self, model: nn.Module, cuts: Sequence[str | Block] | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(f"the model is {shown(model)}; expected an nn.Module")
        if cuts is not None and (isinstance(cuts, str) or not isinstance(cuts, Sequence)):
            raise ModelError(f"cuts is {shown(cuts)}; expected a list of names of submodules, or of Blocks")
        lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
        if lazy:
            raise ModelError(
                f"{type(model).__name__} has parameters without sizes ({', '.join(lazy[:5])}); call it once on a batch beforehand"
            )
        self.model = model
        self.blocks: tuple[Block, ...] = tuple(_block(model, cut) for cut in (_own_cuts(model) if cuts is None else cuts))
        if not self.blocks:
            raise ModelError(f"{type(model).__name__} has no block; expected at least one")
        self.frozen_norms: Sequence[nn.Module] = ()
        """Batch-norm layers that stay in eval mode while the model trains."""
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
        """Every parameter and buffer under all of its names."""
        yield from self.model.named_parameters(remove_duplicate=False)
        yield from self.model.named_buffers(remove_duplicate=False)

    def _names_used(self, block: Block) -> set[str]:
        """The names of the parameters and buffers that a block uses, all names of each."""
        mine = {id(tensor) for name, tensor in self._named_tensors() if _is_inside(name, block.uses)}
        return {name for name, tensor in self._named_tensors() if id(tensor) in mine}

    def in_mode(self, train: bool) -> None:
        """Put the whole model in train or eval mode, with modules that several stages share.

        Stages that take turns in one process may need different modes, so each calls this before it runs.

        Args:
            train: True for train mode, False for eval mode.
        """
        if self.model.training is not train:
            self.model.train(train)
            for layer in self.frozen_norms:
                layer.eval()

    def modules_of(self, blocks: range) -> list[nn.Module]:
        """List the modules that consecutive blocks use, and the modules inside these.

        Args:
            blocks: a range of block numbers.
        """
        uses = [use for i in blocks for use in self.blocks[i].uses]
        return [module for name, module in self.model.named_modules() if _is_inside(name, uses)]

    def parameters_of(self, blocks: range) -> dict[str, nn.Parameter]:
        """The parameters of consecutive blocks by their names in the unsplit model, in the model's order, once each.

        Args:
            blocks: a range of block numbers.
        """
        owned = set[str]().union(*(self._owned[i] for i in blocks))
        return {name: p for name, p in self.model.named_parameters() if name in owned}

    def tensors_of(self, blocks: range) -> dict[str, Tensor]:
        """The parameters and buffers of consecutive blocks by name, once each: what moves between devices and ranks.

        Args:
            blocks: a range of block numbers.
        """
        # asked again: a forward may add buffers
        owned = set[str]().union(*(self._names_used(self.blocks[i]) for i in blocks))
        return {**self.parameters_of(blocks), **{n: b for n, b in self.model.named_buffers() if n in owned}}

    def forms_of(self, blocks: range) -> dict[str, TensorState]:
        """Describe each tensor of `tensors_of(blocks)`, for `adopt` in another process.

        Args:
            blocks: a range of block numbers.
        """
        tensors = self.tensors_of(blocks).items()
        return {name: TensorState(t.shape, t.dtype, isinstance(t, nn.Parameter)) for name, t in tensors}

    def adopt(self, forms: Mapping[str, TensorState]) -> list[Tensor]:
        """List this model's tensors of these names, to be filled from another copy of the model.

        Buffers that this copy lacks, or has in another form, are made first: the other copy's forwards may have replaced
        its buffers.

        Args:
            forms: what `forms_of` returned in the other process.

        Raises:
            ModelError: the two processes built models with different parameters.
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
        """Refuse a trained parameter that two stages share: each would update its own copy, and the copies would drift apart.

        What is not trained, such as frozen weights and the angles of rotary embeddings, may be in several stages: all copies
        are alike. Buffers that a forward writes are another matter (see `model.buffers`).

        Args:
            stages: the range of block numbers of each stage.

        Raises:
            ModelError: two stages share a parameter; names it and the stages.
        """
        owner: dict[int, tuple[int, str]] = {}
        for stage, blocks in enumerate(stages):
            for name, parameter in self.parameters_of(blocks).items():
                first, first_name = owner.setdefault(id(parameter), (stage, name))
                if first != stage and parameter.requires_grad:
                    raise ModelError(
                        f"'{name}' (also '{first_name}') is shared by student stages {first} and {stage}, and tied "
                        "weights cannot be trained in two stages; choose a partition that keeps both in one stage, or untie "
                        "them (a parameter each; for a Hugging Face model, config.tie_word_embeddings=False)"
                    )

    def __call__(self, value: Any) -> Any:
        """Run the whole model, block by block.

        Args:
            value: a batch's inputs, as the first block takes them.
        """
        return self.run(range(len(self)), value)

    def run(self, blocks: range, value: Any, before: Callable[[int], None] = lambda block: None) -> Any:
        """Run consecutive blocks.

        Args:
            blocks: a range of block numbers.
            value: the value before the first of them.
            before: called with each block's number just before the block does anything that random numbers matter for.
        """
        first = blocks.start
        while first < blocks.stop:
            call, end = self.blocks[first].call, first + 1
            if not isinstance(call, JointCall):
                before(first)
                value = call(value)
            else:
                while end < blocks.stop and self._joined(end - 1):
                    end += 1
                start = first
                value = call.run_with([b.call for b in self.blocks[first + 1 : end]], value, lambda i: before(start + i))  # noqa: B023
            first = end
        return value

    def _joined(self, block: int) -> bool:
        """Whether a block's call can run the next block too."""
        call = self.blocks[block].call
        return isinstance(call, JointCall) and call.joins(self.blocks[block + 1].call)


def _is_inside(name: str, uses: Iterable[str]) -> bool:
    """Whether a submodule or tensor is one of those that `uses` name, or lies inside one of them."""
    return any(not use or name == use or name.startswith(f"{use}.") for use in uses)


def _own_cuts(model: nn.Module) -> list[str | Block]:
    """The cuts of a model for which the user names none."""
    declared = getattr(model, "pipeline_blocks", None)
    if callable(declared):
        return list(declared())
    if type(model) is nn.Sequential:
        if model._forward_hooks or model._forward_pre_hooks:
            raise ModelError("the nn.Sequential has forward hooks, which its blocks alone would not call; remove them")
        return list(_sequential_names(model, ""))
    for known_blocks in (language_model_blocks, image_model_blocks, replay_blocks):
        if (blocks := known_blocks(model)) is not None:
            return blocks
    raise ModelError(
        f"cannot tell the blocks of {type(model).__name__}: make it an nn.Sequential, give it a method "
        "pipeline_blocks() that returns the names of its consecutive submodules, or pass such a list as cuts"
    )


def _sequential_names(model: nn.Sequential, prefix: str) -> Iterator[str]:
    """The names of an `nn.Sequential`'s children, in order; sequentials inside it are taken apart too."""
    for name, child in model._modules.items():  # named_children() leaves out a module that comes a second time
        if type(child) is nn.Sequential and not child._forward_hooks and not child._forward_pre_hooks:
            yield from _sequential_names(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _block(model: nn.Module, cut: str | Block) -> Block:
    """The block that a cut stands for; `ModelError` where the model lacks what it names."""
    names = dict(model.named_modules(remove_duplicate=False))
    if isinstance(cut, Block):
        tensors = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        known = {*names, *(name for named in tensors for name, _ in named)}
        for use in cut.uses:
            if use not in known:
                raise ModelError(f"block '{cut.name}' uses '{use}', which {type(model).__name__} lacks{nearest(use, known)}")
        return cut
    if not isinstance(cut, str):
        raise ModelError(f"a cut of {type(model).__name__} is {shown(cut)}; expected the name of a submodule, or a Block")
    if cut not in names:
        raise ModelError(f"cut '{cut}' is no submodule of {type(model).__name__}{nearest(cut, names)}")
    return Block(cut, names[cut], (cut,))


def ranges(partition: Sequence[int]) -> list[range]:
    """Turn a partition, the number of blocks of each stage, into the range of block numbers of each stage."""
    ends = [sum(partition[: i + 1]) for i in range(len(partition))]
    return [range(end - size, end) for end, size in zip(ends, partition, strict=True)]
