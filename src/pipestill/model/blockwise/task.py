"""The task of blockwise distillation, every student block against the teacher block of its number, and the work on one block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.arguments import hinted, one_of, raise_problems, shown
from pipestill.errors import ModelError
from pipestill.losses import BlockLoss, mse
from pipestill.model.block import Block
from pipestill.model.contracts import Contract
from pipestill.model.seeding import seed_block
from pipestill.model.stepwise import restored
from pipestill.model.task_parts import CutModels, check_parts
from pipestill.schedule import Role

_BESIDE_BLOCKS = ("output_projectors", "input_projectors", "candidates")
"""Arguments that give modules by block number, which are trained beside the student's own blocks."""


@hinted
@dataclass(frozen=True)
class Blockwise(CutModels):
    """The task of blockwise training: every student block is trained against the teacher's block of the same number.

    Student block i takes the output of teacher block i - 1, and its loss compares its output with that of teacher block i
    (DNA, Li et al. 2020, section 3; Pipe-BD, Jang et al., DATE 2023). The teacher is frozen, in eval mode, and
    never changed. Every tensor between blocks has one row a sample.

    Args:
        teacher: the model whose blocks' outputs are the targets.
        student: the model whose blocks are trained, cut into as many blocks as the teacher.
        loss: `loss(student_output, teacher_output)` -> the mean over rows, a scalar. One for all blocks, or a list with one
            for each.
        last_loss: the loss of the last block, such as `ps.losses.SoftCrossEntropy` for logits (default: `loss`).
        output_projectors: by block number, a module that maps the student block's output to the form of the teacher's,
            where their widths differ. It is trained with the block and is no part of the student.
        input_projectors: by block number, a module that maps the teacher's previous output to the student block's input,
            likewise.
        candidates: by block number, a list of further modules for the place of the student's block. Each is trained as the
            block is, on the same outputs of the teacher: a library to choose from (PUZZLE, Bercovich et al. 2024).
        teacher_cuts: the teacher's blocks, as `BlockModel` takes them (default: found by `BlockModel`).
        student_cuts: the student's blocks, likewise.

    Raises:
        ModelError: the two have different numbers of blocks, no block has a parameter to train, a module or a loss is of the
            wrong kind, or two of the modules share a tensor.
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
        raise_problems(self._count_problems(), ModelError)
        self._check_apart()
        self.student_blocks.check_ties([range(i, i + 1) for i in range(self.num_blocks)])

    def _module_problems(self) -> Iterator[str]:
        """Find projectors and candidates that are no modules."""
        for name in _BESIDE_BLOCKS:
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

    def _count_problems(self) -> Iterator[str]:
        """Find numbers of blocks that do not fit each other."""
        count = len(self.teacher_blocks)
        if len(self.student_blocks) != count:
            yield (
                f"the student has {len(self.student_blocks)} blocks, the teacher {count}; cut both into as many "
                "(teacher_cuts, student_cuts)"
            )
        if not callable(self.loss) and len(self.loss) != count:
            yield f"{len(self.loss)} losses for {count} blocks; give one for all, or one each"
        for name in _BESIDE_BLOCKS:
            unknown = [i for i in getattr(self, name) if i not in range(count)]
            yield from (f"{name} of block {i}; there are blocks 0 to {count - 1}" for i in unknown)
        if not any(self.parameters_of(i) for i in range(min(count, len(self.student_blocks)))):
            yield "no block has a parameter to train; nothing would be learnt"

    def _check_apart(self) -> None:
        """Refuse modules that share a parameter or a buffer."""
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

    @property
    def num_blocks(self) -> int:
        """The number of blocks of each model."""
        return len(self.teacher_blocks)

    def loss_of(self, block: int) -> BlockLoss:
        """The loss of one block.

        Args:
            block: the block's number.
        """
        if block == self.num_blocks - 1 and self.last_loss is not None:
            return self.last_loss
        return self.loss if callable(self.loss) else self.loss[block]

    def modules_of(self, block: int) -> dict[str, nn.Module]:
        """The projectors and candidates of one block by name, such as `candidates.3.0`.

        Args:
            block: the block's number.
        """
        named = {
            f"output_projectors.{block}": self.output_projectors.get(block),
            f"input_projectors.{block}": self.input_projectors.get(block),
        }
        named |= {f"candidates.{block}.{c}": module for c, module in enumerate(self.candidates.get(block, ()))}
        return {name: module for name, module in named.items() if module is not None}

    def variants(self, block: int) -> list[Callable[[Any], Any]]:
        """The functions that are trained in the place of one block: the student's block and its candidates, with projectors.

        Args:
            block: the block's number.
        """
        before = self.input_projectors.get(block, _same)
        after = self.output_projectors.get(block, _same)
        calls = [self.student_blocks.blocks[block].call, *self.candidates.get(block, ())]
        return [lambda value, call=call: after(call(before(value))) for call in calls]  # type: ignore[misc]

    def parameters_of(self, block: int) -> dict[str, nn.Parameter]:
        """The parameters that one block's optimizer trains, by their names in the student or in `modules_of`.

        Args:
            block: the block's number.
        """
        named = dict(self.student_blocks.parameters_of(range(block, block + 1)))
        for prefix, module in self.modules_of(block).items():
            named |= {f"{prefix}.{name}": p for name, p in module.named_parameters()}
        return {name: p for name, p in named.items() if p.requires_grad}

    def tensors_of(self, block: int) -> dict[str, Tensor]:
        """The parameters and buffers of one block, its projectors and candidates by name: what moves between ranks.

        Args:
            block: the block's number.
        """
        tensors: dict[str, Tensor] = dict(self.student_blocks.tensors_of(range(block, block + 1)))
        for prefix, module in self.modules_of(block).items():
            named = (*module.named_parameters(), *module.named_buffers())
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in named}
        return tensors

    def in_mode(self, train: bool) -> None:
        """Put student, projectors and candidates in train or eval mode, and the teacher in eval mode.

        Args:
            train: True for train mode, False for eval mode.
        """
        self.teacher_blocks.in_mode(train=False)
        self.student_blocks.in_mode(train=train)
        for block in range(self.num_blocks):
            for module in self.modules_of(block).values():
                module.train(train)


def _same(value: Any) -> Any:
    """Project nothing."""
    return value


@dataclass(frozen=True)
class BlockwiseContracts:
    """The contracts of a task: of a batch's inputs, and of the output of each teacher block."""

    inputs: Contract
    outputs: tuple[Contract, ...]
    teacher_writes: frozenset[int]
    """The teacher blocks that write to their input in place; they are given a copy of it."""
    student_writes: frozenset[int]
    """The student blocks that do, likewise."""

    def before(self, block: int) -> Contract:
        """The contract of the input of one block."""
        return self.outputs[block - 1] if block else self.inputs


def teacher_output(task: Blockwise, block: int, value: Any) -> Any:
    """Run one teacher block, without a graph."""
    with torch.no_grad():
        return task.teacher_blocks.blocks[block].call(value)


current_batch: ContextVar[int] = ContextVar("batch")
"""The number of the batch that a student block is being trained on."""


def batch_number() -> int:
    """The number of the batch, counted from 0 over the whole run, that the running student block is trained on.

    A block of a `ps.Blockwise` task calls this where what it does changes with the batch, as a supernet's random paths do.

    Raises:
        LookupError: no student block is being trained.
    """
    return current_batch.get()


def train_block(
    task: Blockwise, block: int, value: Any, target: Any, weight: float, *, seed: int, batch: int, unit: int,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Run forward, loss and backward of one student block and of its candidates, on some rows of a batch.

    `weight` is the fraction of the batch's rows that these are: weighted so, losses and gradients of all parts of a batch
    add up to those of its mean loss. Returns the weighted sum of the variants' losses, detached. Random numbers follow from
    (seed, batch, block, unit), so they are the same on any schedule.
    """
    total: Tensor | None = None
    current_batch.set(batch)
    with torch.enable_grad():
        for number, variant in enumerate(task.variants(block)):
            seed_block(seed, Role.STUDENT, block, batch, unit * len(task.variants(block)) + number, device)
            loss = task.loss_of(block)(variant(value), target)
            part = loss * weight
            if part.requires_grad:  # a block may have nothing to train
                part.backward()
            total = part.detach() if total is None else total + part.detach()
    assert total is not None
    return total


@contextmanager
def untouched_blocks(task: Blockwise) -> Iterator[None]:
    """Run the body with the task's modules in their training modes, and leave no trace in them or in the random state."""
    modules = [task.teacher, task.student]
    modules += [module for block in range(task.num_blocks) for module in task.modules_of(block).values()]
    with restored(modules, [task.loss_of(block) for block in range(task.num_blocks)]):
        task.in_mode(train=True)
        yield
