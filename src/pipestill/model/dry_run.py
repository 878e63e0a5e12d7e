"""One tiny training step before anything starts, which finds the contracts of all boundaries and what cannot work."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import replace
from typing import Any

import torch

from pipestill.errors import ModelError, UserError
from pipestill.model.blocks import BlockModel
from pipestill.model.checks import UsesCheck, check_chain, check_joinable, why_blocks_stay_whole
from pipestill.model.contracts import Contract, observe
from pipestill.model.lengths import length_of, sample_lengths, shortened
from pipestill.model.nests import copied, describe, distinct_tensors, num_rows, rows_of
from pipestill.model.pipeline_contracts import PipelineContracts, PipelineContractsByLength
from pipestill.model.stepwise import StepValues, call_block, stepwise, untouched
from pipestill.model.tasks import Task, check_views, view
from pipestill.model.tensor_form import FEW, MORE


def dry_run(
    task: Task, inputs: Any, targets: Any, *, split: bool = False, length_axis: int | None = None
) -> PipelineContracts:
    """Run forward, loss and backward on 2 and on 3 rows of a sample batch, without a trace left in the models.

    `split`: also find out which student blocks cannot take their backward in two halves. `length_axis`: batches may differ
    in the size of that axis, so the same is done at three lengths; the contracts are those at the sample's length.

    Raises `ModelError` that names the block or the loss that fails, or the boundary that changes with more than its rows
    (and its length).
    """
    if length_axis is None:
        return _dry_run(task, inputs, targets, split)
    lengths = sample_lengths(length_of(length_axis, inputs, targets, "the batch"))
    found = []
    for length in lengths:
        few, labels = (shortened(length_axis, nest, length) for nest in (inputs, targets))
        found.append(_dry_run(task, few, labels, split and length == lengths[-1]))
    if any(contracts.loss_parts != found[0].loss_parts for contracts in found):
        raise ModelError("the loss has other parts at other lengths; it must always give the same ones")
    copies = frozenset[int]().union(*(contracts.copies for contracts in found))
    by_length = PipelineContractsByLength(lengths, [replace(contracts, copies=copies) for contracts in found])
    return replace(found[-1], copies=copies, by_length=by_length)


def _dry_run(task: Task, inputs: Any, targets: Any, split: bool) -> PipelineContracts:
    """The contracts of batches of the sample's length."""
    check_views(task, inputs)
    rows = num_rows(inputs, "the batch's inputs")
    if distinct_tensors(targets) and num_rows(targets, "the batch's targets") != rows:
        raise ModelError(f"the batch has {rows} rows of inputs and {num_rows(targets, 'targets')} of targets")
    few_rows, more_rows = (torch.arange(count) % rows for count in (FEW, MORE))
    few_inputs, more_inputs = rows_of(inputs, few_rows), rows_of(inputs, more_rows)
    few_targets, more_targets = rows_of(targets, few_rows), rows_of(targets, more_rows)
    student, teacher = task.student_blocks, task.teacher_blocks
    with untouched(task):
        few = stepwise(task, few_inputs, few_targets, UsesCheck(student))
        more = stepwise(task, more_inputs, more_targets, UsesCheck(student))
        unsplit = why_blocks_stay_whole(student, more.student) if split else {}
    if task.demands.batch_loss:
        check_joinable(few, more)
    check_chain(task, "student", student, view(task, more_inputs, 0))
    if teacher is not None:
        check_chain(task, "teacher", teacher, view(task, more_inputs, 0))
    return PipelineContracts(
        inputs=observe("the batch's inputs", few_inputs, more_inputs),
        targets=observe("the batch's targets", few_targets, more_targets),
        student=tuple(_contracts("student", student, few, more, v) for v in range(len(more.student))),
        teacher=tuple(_contracts("teacher", teacher, few, more, v) for v in range(len(more.teacher)) if teacher),
        loss_parts=more.loss_parts,
        copies=more.copies,
        unsplit=unsplit,
    )


def _contracts(role: str, model: BlockModel, few: StepValues, more: StepValues, view: int) -> tuple[Contract, ...]:
    """The contracts after each block of one model in one view."""
    values = [getattr(run, role)[view] for run in (few, more)]
    return tuple(
        observe(
            f"after {role} block {i} ('{block.name}')",
            values[0][i],
            values[1][i],
            (few.gradients[view][i], more.gradients[view][i]) if role == "student" else None,
        )
        for i, block in enumerate(model.blocks)
    )


def try_validation(
    task: Task, contracts: PipelineContracts, inputs: Any, targets: Any, rows: int, ends: Set[int],
    add: Callable[[Any, Any, int], None],
) -> None:  # fmt: skip
    """Evaluate a microbatch of validation data, without a trace left in the models.

    `add(output, targets, rows)` computes its metrics. `ends` holds where stages end, in blocks: the values there must be
    what they are in training. Raises `UserError`s that name what fails.
    """
    model = task.student_blocks
    with untouched(task), torch.no_grad():
        model.in_mode(train=False)
        value = copied(inputs)
        views = "; one view of each sample is validated, not all" if task.demands.views > 1 else ""
        for i in range(len(model)):
            value = call_block("validation: student", model, i, value, "" if i else views)
            if i + 1 in ends and i + 1 < len(model):
                contracts.student[0][i].split(value, rows)
        if len(ends) > 1:
            contracts.targets.split(targets, rows)
        try:
            add(value, targets, rows)
        except UserError:
            raise
        except Exception as error:
            raise ModelError(
                f"the metrics cannot take output {describe(value)}, target {describe(targets)}: {type(error).__name__}: {error}"
            ) from error
