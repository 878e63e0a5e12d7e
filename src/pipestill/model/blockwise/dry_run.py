"""One tiny training step of every block, before anything starts: finds the contracts, and what cannot work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipestill.errors import ModelError
from pipestill.model.blockwise.contracts import BlockwiseContracts
from pipestill.model.blockwise.task import Blockwise
from pipestill.model.blockwise.training import current_batch, teacher_output, untouched_blocks
from pipestill.model.contracts import observe
from pipestill.model.nests import copied, describe, distinct_tensors, num_rows, rows_of
from pipestill.model.tensor_form import FEW, MORE


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
        observe(f"after teacher block {i} ('{block.name}')", few[i + 1], more[i + 1])
        for i, block in enumerate(task.teacher_blocks.blocks)
    )
    return BlockwiseContracts(
        observe("the batch's inputs", few[0], more[0]), outputs, frozenset(taught), frozenset(learnt)
    )


def _run(task: Blockwise, inputs: Any, rows: int) -> tuple[list[Any], list[int], list[int]]:
    values, taught, learnt = [inputs], list[int](), list[int]()
    current_batch.set(0)
    for i, block in enumerate(task.teacher_blocks.blocks):
        given = copied(values[-1])
        versions = [t._version for t in distinct_tensors(given)]
        try:
            values.append(teacher_output(task, i, given))
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
    hint = "; where widths differ, give projectors (input_projectors, output_projectors)" if target is not None else ""
    return ModelError(
        f"{role} block {block} ('{name}') cannot take {describe(given)}{against}: {type(error).__name__}: {error}{hint}"
    )
