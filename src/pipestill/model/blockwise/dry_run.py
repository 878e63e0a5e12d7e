"""One tiny training step of every block before anything starts, which finds the contracts and what cannot work."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipestill.errors import ModelError
from pipestill.model.blockwise.task import Blockwise, BlockwiseContracts, current_batch, untouched_blocks
from pipestill.model.buffers import held_buffers, written_buffers
from pipestill.model.contracts import FEW, MORE, observe
from pipestill.model.nests import copied, describe, distinct_tensors, num_rows, rows_of, watched
from pipestill.model.stepwise import call_block


def blockwise_dry_run(task: Blockwise, inputs: Any) -> BlockwiseContracts:
    """Run every block on 2 and on 3 rows of a sample batch, without a trace left in the models.

    Raises `ModelError` that names the block or the loss that fails, a loss that trains nothing, or a boundary whose tensors
    are not one row a sample.
    """
    rows = num_rows(inputs, "the batch's inputs")
    with untouched_blocks(task):
        few, more = (_run(task, rows_of(inputs, torch.arange(count) % rows), count) for count in (FEW, MORE))
    return BlockwiseContracts(
        inputs=observe("the batch's inputs", few.values[0], more.values[0]),
        outputs=tuple(
            observe(f"after teacher block {i} ('{block.name}')", few.values[i + 1], more.values[i + 1])
            for i, block in enumerate(task.teacher_blocks.blocks)
        ),
        teacher_writes=frozenset(more.teacher_writes),
        student_writes=frozenset(more.student_writes),
    )


@dataclass
class _Run:
    """What one run of every block on a few rows has shown."""

    values: list[Any]
    """The batch's inputs, then the output of each teacher block."""
    teacher_writes: list[int] = field(default_factory=list)
    """The teacher blocks that write to their input in place."""
    student_writes: list[int] = field(default_factory=list)
    """The student blocks that do."""


def _run(task: Blockwise, inputs: Any, rows: int) -> _Run:
    """Run all teacher blocks, then each student block with its loss and backward."""
    run = _Run([inputs])
    current_batch.set(0)
    for i in range(task.num_blocks):
        _run_teacher(task, i, rows, run)
    for i in range(task.num_blocks):
        _run_student(task, i, run)
    return run


def _run_teacher(task: Blockwise, i: int, rows: int, run: _Run) -> None:
    """Run one teacher block and note what it shows."""
    given = copied(run.values[-1])
    written = watched(given)
    with torch.no_grad():
        run.values.append(call_block("teacher", task.teacher_blocks, i, given, ""))
    if written():
        run.teacher_writes.append(i)
    for tensor in distinct_tensors(run.values[-1]):
        if tensor.dim() == 0 or tensor.shape[0] != rows:
            raise ModelError(
                f"teacher block {i} ('{task.teacher_blocks.blocks[i].name}') gives {describe(run.values[-1])} for {rows} rows; "
                "ranks that train blocks pass rows on, so give tensors of one row a sample"
            )


def _run_student(task: Blockwise, i: int, run: _Run) -> None:
    """Run one student block and its candidates, each with its loss and backward, and note what they show."""
    given, target = copied(run.values[i]), run.values[i + 1]
    writes, written = False, watched(given)
    own, others = _buffers_of(task, i)
    held = held_buffers(task.student_blocks, own & others.keys())
    try:
        for variant, trains in zip(task.variants(i), _trained(task, i), strict=True):
            with torch.enable_grad():
                output = variant(copied(given) if writes else given)
                writes = writes or written()
                loss = task.loss_of(i)(output, target)
                _check_loss(loss, i, trains)
                if trains:
                    loss.backward()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"student block {i} ('{task.student_blocks.blocks[i].name}') cannot take {describe(given)} and be compared with "
            f"{describe(target)}: {type(error).__name__}: {error}; where widths differ, give projectors (input_projectors, "
            "output_projectors)"
        ) from error
    if writes:
        run.student_writes.append(i)
    _check_buffers(task, i, others, written_buffers(task.student_blocks, held))


def _trained(task: Blockwise, i: int) -> list[bool]:
    """Whether each variant of a block has something to train: a candidate may be one that has nothing, to skip the block."""
    projectors = [module for name, module in task.modules_of(i).items() if not name.startswith("candidates.")]
    beside = [p for module in projectors for p in module.parameters()]
    own = [task.student_blocks.parameters_of(range(i, i + 1)).values(), *(m.parameters() for m in task.candidates.get(i, ()))]
    return [any(p.requires_grad for p in (*parameters, *beside)) for parameters in own]


def _buffers_of(task: Blockwise, block: int) -> tuple[set[str], dict[str, int]]:
    """The names of a student block's tensors, and another block for each name of those of other blocks."""
    names = [set(task.student_blocks.tensors_of(range(i, i + 1))) for i in range(task.num_blocks)]
    return names[block], {name: i for i in range(task.num_blocks) if i != block for name in names[i]}


def _check_buffers(task: Blockwise, block: int, others: Mapping[str, int], written: set[str]) -> None:
    """Refuse a buffer that a student block has written and that is part of another block too."""
    for name in sorted(written):
        one, other = (f"block {i} ('{task.student_blocks.blocks[i].name}')" for i in (block, others[name]))
        raise ModelError(
            f"buffer '{name}' is written by student {one} and is part of {other} too, and blocks that are trained alone share "
            "nothing that changes; give each a buffer of its own"
        )


def _check_loss(loss: Any, block: int, trains: bool) -> None:
    """Refuse a loss that is no scalar, or that trains nothing in a block that has something to train."""
    if not isinstance(loss, Tensor) or loss.dim():
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ModelError(f"the loss of block {block} gave {shape}; expected a scalar")
    if trains and not loss.requires_grad:
        raise ModelError(f"the loss of block {block} does not depend on any trained parameter; nothing would be learnt")
