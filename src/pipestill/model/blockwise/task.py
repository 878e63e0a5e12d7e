"""Blockwise distillation as a value: which student block learns from which teacher block, and by what loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.arguments import one_of, shown
from pipestill.errors import ModelError
from pipestill.losses import BlockLoss, mse
from pipestill.model.blocks import Block, BlockModel
from pipestill.model.boundary import FEW, MORE, Contract, copied, distinct_tensors, learn, num_rows, rows_of
from pipestill.model.seeding import seed_block
from pipestill.model.stepwise import describe, restored
from pipestill.model.tasks import check_parts
from pipestill.schedule import Role


@dataclass(frozen=True)
class Blockwise:
    """Every student block is trained alone: it takes what teacher block i - 1 gives, and learns to give what block i gives.

    Teacher and student have as many blocks (cuts: see `BlockModel`). `loss(student_output, teacher_output)` is the mean over
    the rows it gets: one for all blocks, or a list of one each; `last_loss` replaces that of the last block. The teacher is
    frozen, in eval mode, and never changed.

    Where widths differ, `adapters[i]` maps what student block i gives to the form of the teacher's, and
    `input_adapters[i]` what it gets; they are trained with the block and are no part of the student. `candidates[i]` are
    further modules for the place of student block i, each trained like it on the same pass of the teacher: a library to
    choose from (PUZZLE, Bercovich et al. 2024). (Pipe-BD, Jang et al., DATE 2023; DNA, Li et al. 2020.)
    """

    teacher: nn.Module
    student: nn.Module
    loss: BlockLoss | Sequence[BlockLoss] = mse
    last_loss: BlockLoss | None = None
    adapters: Mapping[int, nn.Module] = field(default_factory=dict)
    input_adapters: Mapping[int, nn.Module] = field(default_factory=dict)
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
        for name in ("adapters", "input_adapters", "candidates"):
            unknown = [i for i in getattr(self, name) if i not in range(count)]
            problems += [f"{name} of block {i}; there are blocks 0 to {count - 1}" for i in unknown]
        if not any(self.parameters_of(i) for i in range(min(count, len(self.student_blocks)))):
            problems.append("no block has a parameter to train; nothing would be learnt")
        if problems:
            raise ModelError("; ".join(problems))
        modules = [self.teacher, self.student, *self.adapters.values(), *self.input_adapters.values()]
        modules += [module for several in self.candidates.values() for module in several]
        owners: dict[int, int] = {}
        for place, module in enumerate(modules):
            for tensor in (*module.parameters(), *module.buffers()):
                if owners.setdefault(id(tensor), place) != place:
                    raise ModelError(
                        "two of teacher, student, adapters and candidates share a parameter or buffer; each needs its own "
                        "(copy.deepcopy)"
                    )
        self.student_blocks.check_ties([range(i, i + 1) for i in range(count)])

    def _module_problems(self) -> Iterator[str]:
        """What is wrong with the kinds of adapters and candidates."""
        for name in ("adapters", "input_adapters", "candidates"):
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
            f"adapters.{block}": self.adapters.get(block),
            f"input_adapters.{block}": self.input_adapters.get(block),
        }
        named |= {f"candidates.{block}.{c}": module for c, module in enumerate(self.candidates.get(block, ()))}
        return {name: module for name, module in named.items() if module is not None}

    def variants(self, block: int) -> list[Callable[[Any], Any]]:
        """The student's block and its candidates, each with the adapters."""
        before = self.input_adapters.get(block, _same)
        after = self.adapters.get(block, _same)
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
        """Student, adapters and candidates in train or eval mode; the teacher always in eval mode."""
        self.teacher_blocks.in_mode(train=False)
        self.student_blocks.in_mode(train=train)
        for block in range(self.num_blocks):
            for module in self.modules_of(block).values():
                module.train(train)


def _same(value: Any) -> Any:
    return value


def teach(task: Blockwise, block: int, value: Any) -> Any:
    """What a teacher block gives, without a graph."""
    with torch.no_grad():
        return task.teacher_blocks.blocks[block].call(value)


_batch: ContextVar[int] = ContextVar("batch")


def batch_number() -> int:
    """Which batch of the run, from 0, a student block is being trained on; for blocks that change with it.

    Raises `LookupError` outside of blockwise training.
    """
    return _batch.get()


def learn_block(
    task: Blockwise, block: int, value: Any, target: Any, share: float, *, seed: int, batch: int, unit: int,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Forward, loss and backward of a student block and its candidates, for `share` of a batch's rows.

    Gradients of the batch's mean loss add up over shares. Returns that part of the sum of the variants' losses, detached.
    Random numbers follow from (seed, batch, block, unit), so that they are the same on any schedule.
    """
    total: Tensor | None = None
    _batch.set(batch)
    with torch.enable_grad():
        for number, variant in enumerate(task.variants(block)):
            seed_block(seed, Role.STUDENT, block, batch, unit * len(task.variants(block)) + number, device)
            loss = task.loss_of(block)(variant(value), target)
            part = loss * share
            if part.requires_grad:  # a block may have nothing to train
                part.backward()
            total = part.detach() if total is None else total + part.detach()
    assert total is not None
    return total


@dataclass(frozen=True)
class BlockwiseContracts:
    """What crosses between blocks: the samples' contract, and that of what each teacher block gives.

    `teacher_writes` and `student_writes` hold the blocks that write to their input in place; these get a copy of it.
    """

    inputs: Contract
    outputs: tuple[Contract, ...]
    teacher_writes: frozenset[int]
    student_writes: frozenset[int]

    def before(self, block: int) -> Contract:
        """Of what a block gets."""
        return self.outputs[block - 1] if block else self.inputs


def blockwise_dry_run(task: Blockwise, inputs: Any) -> BlockwiseContracts:
    """Run every block on 2 and on 3 rows, without a trace left in the models.

    Raises `ModelError` naming the block or the loss that fails, a loss that trains nothing, and boundaries whose tensors
    are not one row a sample.
    """
    rows = num_rows(inputs, "the batch's inputs")
    runs = []
    with untouched_blocks(task):
        for count in (FEW, MORE):
            runs.append(_run(task, rows_of(inputs, torch.arange(count) % rows), count))
    (few, _, _), (more, taught, learnt) = runs
    outputs = tuple(
        learn(f"after teacher block {i} ('{block.name}')", few[i + 1], more[i + 1])
        for i, block in enumerate(task.teacher_blocks.blocks)
    )
    return BlockwiseContracts(learn("the batch's inputs", few[0], more[0]), outputs, frozenset(taught), frozenset(learnt))


def _run(task: Blockwise, inputs: Any, rows: int) -> tuple[list[Any], list[int], list[int]]:
    values, taught, learnt = [inputs], list[int](), list[int]()
    _batch.set(0)
    for i, block in enumerate(task.teacher_blocks.blocks):
        given = copied(values[-1])
        versions = [t._version for t in distinct_tensors(given)]
        try:
            values.append(teach(task, i, given))
        except Exception as error:
            raise _failed("teacher", i, block.name, given, error) from error
        if [t._version for t in distinct_tensors(given)] != versions:
            taught.append(i)
        for tensor in distinct_tensors(values[-1]):
            if tensor.dim() == 0 or tensor.shape[0] != rows:
                raise ModelError(
                    f"teacher block {i} ('{block.name}') gives {describe(values[-1])} for {rows} rows; blocks that learn "
                    "alone pass rows on, so give tensors of one row a sample"
                )
    for i, student in enumerate(task.student_blocks.blocks):
        given = copied(values[i])
        versions = [t._version for t in distinct_tensors(given)]
        parameters = task.parameters_of(i)
        try:
            for variant in task.variants(i):
                with torch.enable_grad():
                    output = variant(copied(given) if i in learnt else given)
                    if [t._version for t in distinct_tensors(given)] != versions and i not in learnt:
                        learnt.append(i)
                    loss = task.loss_of(i)(output, values[i + 1])
                    _check_loss(loss, i, bool(parameters))
                    if parameters:
                        loss.backward()
        except ModelError:
            raise
        except Exception as error:
            raise _failed("student", i, student.name, given, error, values[i + 1]) from error
    return values, taught, learnt


def _check_loss(loss: Any, block: int, trains: bool) -> None:
    if not isinstance(loss, Tensor) or loss.dim():
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ModelError(f"the loss of block {block} gave {shape}; expected a scalar")
    if trains and not loss.requires_grad:
        raise ModelError(f"the loss of block {block} does not depend on any trained parameter; nothing would be learnt")


def _failed(role: str, block: int, name: str, given: Any, error: Exception, target: Any = None) -> ModelError:
    against = f" and learn {describe(target)}" if target is not None else ""
    hint = "; where widths differ, give adapters" if target is not None else ""
    return ModelError(
        f"{role} block {block} ('{name}') cannot take {describe(given)}{against}: {type(error).__name__}: {error}{hint}"
    )


@contextmanager
def untouched_blocks(task: Blockwise) -> Iterator[None]:
    """The modes of training; buffers, gradients, modes and the random state put back afterwards."""
    modules = [task.teacher, task.student]
    modules += [module for block in range(task.num_blocks) for module in task.modules_of(block).values()]
    with restored(modules):
        task.in_mode(train=True)
        yield
