"""One tiny training step before anything starts, which finds the contracts of all boundaries and what cannot work.

Beyond taking each other's values, a task's blocks must fulfil what makes a pipeline compute what the model does.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pipestill.errors import ModelError, UserError
from pipestill.model.additive import check_additive
from pipestill.model.blocks import BlockModel
from pipestill.model.boundary import why_whole
from pipestill.model.buffers import shared_buffers
from pipestill.model.chain import TrainedWatch, check_chain
from pipestill.model.contracts import FEW, MORE, Contract, observe
from pipestill.model.heads import heads_applied
from pipestill.model.nests import copied, describe, distinct_tensors, num_rows, rows_of
from pipestill.model.pipeline_contracts import PipelineContracts, PipelineContractsByLength, length_of, sample_lengths, shortened
from pipestill.model.stepwise import StepValues, call_block, stepwise, untouched
from pipestill.model.strays import check_strays
from pipestill.model.tasks import Distillation, Task, check_views, view


def dry_run(task: Task, inputs: Any, targets: Any, *, split: bool = False, length_axis: int | None = None) -> PipelineContracts:
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
    if any(contracts.all_parts != found[0].all_parts for contracts in found):
        raise ModelError("the loss has other parts at other lengths; it must always give the same ones")
    copies = frozenset[int]().union(*(contracts.copies for contracts in found))
    of_teacher = frozenset[int]().union(*(contracts.teacher_copies for contracts in found))
    found = [replace(contracts, copies=copies, teacher_copies=of_teacher) for contracts in found]
    return replace(found[-1], by_length=PipelineContractsByLength(lengths, found))


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
        watch = TrainedWatch(student)
        few = stepwise(task, few_inputs, few_targets, watch.done)
        more = stepwise(task, more_inputs, more_targets, watch.done)
        check_strays(task, few_inputs, few_targets)
        unsplit = why_blocks_stay_whole(student, more.student) if split else {}
        shared = shared_buffers("student", student, view(task, more_inputs, 0))
        shared += () if teacher is None else shared_buffers("teacher", teacher, view(task, more_inputs, 0))
    parts = [*more.loss_parts, *(name for names in more.feature_parts for name in names)]
    if twice := sorted({name for name in parts if parts.count(name) > 1}):
        raise ModelError(f"two parts of the loss are named {', '.join(twice)}; give the features other names")
    counted = check_counts(task, (few_targets, more_targets), parts)
    if task.demands.batch_loss:
        check_joinable(few, more)
    else:
        with untouched(task):
            check_additive(task, few, more, (few_targets, more_targets))
    watch.warn_of_untrained()
    with heads_applied(task.heads if isinstance(task, Distillation) else ()):
        check_chain(task, "student", student, view(task, more_inputs, 0))
        if teacher is not None:
            check_chain(task, "teacher", teacher, view(task, more_inputs, 0))
    check_heads(task, more_inputs)
    return PipelineContracts(
        inputs=observe("the batch's inputs", few_inputs, more_inputs),
        targets=observe("the batch's targets", few_targets, more_targets),
        student=tuple(_contracts("student", student, few, more, v) for v in range(len(more.student))),
        teacher=tuple(_contracts("teacher", teacher, few, more, v) for v in range(len(more.teacher)) if teacher),
        loss_parts=more.loss_parts,
        copies=more.copies,
        feature_parts=more.feature_parts,
        taps=tuple(
            observe(f"what features take of teacher block {tap.block}", few.taps[number], more.taps[number])
            for number, tap in enumerate(task.feature_losses.taps)
        ),
        teacher_copies=more.teacher_copies,
        counted=counted,
        unsplit=unsplit,
        shared_buffers=shared,
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


def check_heads(task: Task, inputs: Any) -> None:
    """Refuse heads that the loss is to apply, but after which a model does something else with its logits."""
    if isinstance(task, Distillation) and task.heads:
        with untouched(task), torch.no_grad():
            for head in task.heads:
                head.blocks.model.eval()
                head.check(copied(inputs))


def check_joinable(few: StepValues, more: StepValues) -> None:
    """Refuse outputs that a loss over the whole batch could not get joined from those of its microbatches."""
    for rows, values in ((FEW, few), (MORE, more)):
        outputs = [of_view[-1] for of_view in (*values.student, *values.teacher)]
        for output in (*outputs, *values.taps):
            for leaf in pytree.tree_leaves(output):
                if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != rows:
                    raise ModelError(
                        f"a loss over the whole batch joins the outputs of microbatches by their first axis, "
                        f"but for {rows} rows there is {describe(leaf)} in an output; give tensors of one row a sample"
                    )


def check_counts(task: Task, targets: Sequence[Any], parts: Sequence[str]) -> tuple[str, ...]:
    """The parts of the loss that targets count for; `ModelError` where they change, or the loss has no such parts."""
    few, more = (tuple(task.loss_counts(given)) for given in targets)
    if few != more:
        raise ModelError(
            f"the loss's counts(target) gave a count for {', '.join(few) or 'no part'} and, for other rows, for "
            f"{', '.join(more) or 'no part'}; it must always name the same parts"
        )
    unknown = [name for name in more if name not in parts]
    if unknown:
        raise ModelError(f"the loss's counts(target) names {', '.join(unknown)}, and the loss has the parts {', '.join(parts)}")
    return more


def why_blocks_stay_whole(model: BlockModel, views: Sequence[Sequence[Any]]) -> dict[int, str]:
    """Find the student blocks whose backward cannot be taken in two halves, and why.

    `views` holds, by view and block, the value after each block. The first block is not tried: its input has no gradient, so
    its backward is one half anyway.
    """
    reasons: dict[int, str] = {}
    named = [set(model.parameters_of(range(i, i + 1))) for i in range(len(model))]
    for i in range(len(model)):
        if any(named[i] & named[j] for j in range(len(model)) if j != i):
            reasons[i] = "it shares a weight with another block"
    for outputs in views:
        for i in range(1, len(model)):
            trained = [p for p in model.parameters_of(range(i, i + 1)).values() if p.requires_grad]
            reason = why_whole(model.blocks[i].call, trained, outputs[i - 1]) if trained and i not in reasons else None
            if reason is not None:
                reasons[i] = reason
    return reasons
