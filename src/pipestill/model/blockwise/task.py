"""Blockwise distillation as a value: which student block learns from which teacher block, and by what loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from pipestill.arguments import one_of, shown
from pipestill.errors import ModelError
from pipestill.losses import BlockLoss, mse
from pipestill.model.block import Block
from pipestill.model.blocks import BlockModel
from pipestill.model.tasks import check_parts


@dataclass(frozen=True)
class Blockwise:
    """Every student block is trained alone: it takes what teacher block i - 1 gives, and learns to give what block i gives.

    Teacher and student have as many blocks (cuts: see `BlockModel`). `loss(student_output, teacher_output)` is the mean over
    the rows it gets: one for all blocks, or a list of one each; `last_loss` replaces that of the last block. The teacher is
    frozen, in eval mode, and never changed.

    Where widths differ, `output_projectors[i]` maps what student block i gives to the form of the teacher's, and
    `input_projectors[i]` what it gets; they are trained with the block and are no part of the student. `candidates[i]` are
    further modules for the place of student block i, each trained like it on the same pass of the teacher: a library to
    choose from (PUZZLE, Bercovich et al. 2024). (Pipe-BD, Jang et al., DATE 2023; DNA, Li et al. 2020.)
    """

    teacher: nn.Module
    student: nn.Module
    loss: BlockLoss | Sequence[BlockLoss] = mse
    last_loss: BlockLoss | None = None
    output_projectors: Mapping[int, nn.Module] = field(default_factory=dict)
    input_projectors: Mapping[int, nn.Module] = field(default_factory=dict)
    candidates: Mapping[int, Sequence[nn.Module]] = field(default_factory=dict)
    teacher_cuts: Sequence[str | Block] | None = None
    student_cuts: Sequence[str | Block] | None = None

    def __post_init__(self) -> None:
        losses = self.loss if isinstance(self.loss, (list, tuple)) else [self.loss]
        named = {f"the loss of block {i}" if len(losses) > 1 else "the loss": loss for i, loss in enumerate(losses)}
        check_parts(
            {"teacher": self.teacher, "student": self.student},
            {**named, **({} if self.last_loss is None else {"last_loss": self.last_loss})},
            self._module_problems(),
        )
        problems = []
        count = len(self.teacher_blocks)
        if len(self.student_blocks) != count:
            problems.append(
                f"the student has {len(self.student_blocks)} blocks, the teacher {count}; cut both into as many "
                "(teacher_cuts, student_cuts)"
            )
        if not callable(self.loss) and len(self.loss) != count:
            problems.append(f"{len(self.loss)} losses for {count} blocks; give one for all, or one each")
        for name in ("output_projectors", "input_projectors", "candidates"):
            unknown = [i for i in getattr(self, name) if i not in range(count)]
            problems += [f"{name} of block {i}; there are blocks 0 to {count - 1}" for i in unknown]
        if not any(self.parameters_of(i) for i in range(min(count, len(self.student_blocks)))):
            problems.append("no block has a parameter to train; nothing would be learnt")
        if problems:
            raise ModelError("; ".join(problems))
        modules = [self.teacher, self.student, *self.output_projectors.values(), *self.input_projectors.values()]
        modules += [module for several in self.candidates.values() for module in several]
        owners: dict[int, int] = {}
        for place, module in enumerate(modules):
            for tensor in (*module.parameters(), *module.buffers()):
                if owners.setdefault(id(tensor), place) != place:
                    raise ModelError(
                        "two of teacher, student, projectors and candidates share a parameter or buffer; each needs its own "
                        "(copy.deepcopy)"
                    )
        self.student_blocks.check_ties([range(i, i + 1) for i in range(count)])

    def _module_problems(self) -> Iterator[str]:
        """What is wrong with the kinds of projectors and candidates."""
        for name in ("output_projectors", "input_projectors", "candidates"):
            given = getattr(self, name)
            if not isinstance(given, Mapping):
                yield f"{name} is {shown(given)}; expected a dict by the number of the block"
                continue
            for i, value in given.items():
                several = name == "candidates"
                if several and not isinstance(value, (list, tuple, nn.ModuleList)):
                    yield f"candidates[{i}] is {shown(value)}; expected a list of nn.Modules"
                    continue
                for module in value if several else [value]:
                    yield from one_of(f"{name}[{i}]", module, nn.Module, "an nn.Module")

    @cached_property
    def teacher_blocks(self) -> BlockModel:
        return BlockModel(self.teacher, self.teacher_cuts)

    @cached_property
    def student_blocks(self) -> BlockModel:
        return BlockModel(self.student, self.student_cuts)

    @property
    def num_blocks(self) -> int:
        return len(self.teacher_blocks)

    def loss_of(self, block: int) -> BlockLoss:
        """The loss of one block."""
        if block == self.num_blocks - 1 and self.last_loss is not None:
            return self.last_loss
        return self.loss if callable(self.loss) else self.loss[block]

    def modules_of(self, block: int) -> dict[str, nn.Module]:
        """What is trained in the place of a block besides the student itself, by name."""
        named = {
            f"output_projectors.{block}": self.output_projectors.get(block),
            f"input_projectors.{block}": self.input_projectors.get(block),
        }
        named |= {f"candidates.{block}.{c}": module for c, module in enumerate(self.candidates.get(block, ()))}
        return {name: module for name, module in named.items() if module is not None}

    def variants(self, block: int) -> list[Callable[[Any], Any]]:
        """The student's block and its candidates, each with the projectors."""
        before = self.input_projectors.get(block, _same)
        after = self.output_projectors.get(block, _same)
        calls = [self.student_blocks.blocks[block].call, *self.candidates.get(block, ())]
        return [lambda value, call=call: after(call(before(value))) for call in calls]  # type: ignore[misc]

    def parameters_of(self, block: int) -> dict[str, nn.Parameter]:
        """What a block's optimizer trains, by name: the student's own names, and those of `modules_of`."""
        named = dict(self.student_blocks.parameters_of(range(block, block + 1)))
        for prefix, module in self.modules_of(block).items():
            named |= {f"{prefix}.{name}": p for name, p in module.named_parameters()}
        return {name: p for name, p in named.items() if p.requires_grad}

    def tensors_of(self, block: int) -> dict[str, Tensor]:
        """Parameters and buffers of a block and what is trained beside it: what moves between ranks."""
        tensors: dict[str, Tensor] = dict(self.student_blocks.tensors_of(range(block, block + 1)))
        for prefix, module in self.modules_of(block).items():
            named = (*module.named_parameters(), *module.named_buffers())
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in named}
        return tensors

    def in_mode(self, train: bool) -> None:
        """Student, projectors and candidates in train or eval mode; the teacher always in eval mode."""
        self.teacher_blocks.in_mode(train=False)
        self.student_blocks.in_mode(train=train)
        for block in range(self.num_blocks):
            for module in self.modules_of(block).values():
                module.train(train)


def _same(value: Any) -> Any:
    return value
