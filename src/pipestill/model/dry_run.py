"""One tiny training step, before anything starts: learns every boundary's contract and finds what cannot work."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pipestill.errors import ModelError, UserError
from pipestill.model.blocks import BlockModel
from pipestill.model.contracts import Contract, observe
from pipestill.model.lengths import length_of, sample_lengths, shortened
from pipestill.model.nests import copied, describe, distinct_tensors, num_rows, rows_of
from pipestill.model.pipeline_contracts import PipelineContracts, PipelineContractsByLength
from pipestill.model.split import why_whole
from pipestill.model.stepwise import StepValues, stepwise, untouched
from pipestill.model.tasks import Task, check_views, view
from pipestill.model.tensor_form import FEW, MORE


def dry_run(
    task: Task, inputs: Any, targets: Any, *, split: bool = False, length_axis: int | None = None
) -> PipelineContracts:
    """Run forward, loss and backward on 2 and on 3 rows of a sample batch, without a trace left in the models.

    `split`: find out which student blocks cannot take their backward in two halves, too. `length_axis`: batches may differ
    in the size of that axis, so the same is done at three lengths; the contracts are those at the sample's.

    Raises `ModelError` naming the block or the loss that fails, or the boundary that changes with more than its rows (and
    its length).
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
    check_views(task, inputs)
    rows = num_rows(inputs, "the batch's inputs")
    if distinct_tensors(targets) and num_rows(targets, "the batch's targets") != rows:
        raise ModelError(f"the batch has {rows} rows of inputs and {num_rows(targets, 'targets')} of targets")
    values = []
    with untouched(task):
        for count in (FEW, MORE):
            index = torch.arange(count) % rows
            values.append((rows_of(inputs, index), rows_of(targets, index)))
        few, more = (stepwise(task, *value, _UsesCheck(task.student_blocks)) for value in values)
        unsplit = _unsplit(task.student_blocks, more.student) if split else {}
    if task.demands.batch_loss:
        _check_joinable(few, more)
    teacher = task.teacher_blocks
    check_chain(task, "student", task.student_blocks, view(task, values[1][0], 0))
    if teacher is not None:
        check_chain(task, "teacher", teacher, view(task, values[1][0], 0))
    return PipelineContracts(
        inputs=observe("the batch's inputs", values[0][0], values[1][0]),
        targets=observe("the batch's targets", values[0][1], values[1][1]),
        student=tuple(
            _observe_blocks(
                "student", task.student_blocks, few.student[v], more.student[v], (few.gradients[v], more.gradients[v])
            )
            for v in range(task.demands.views)
        ),
        teacher=tuple(
            _observe_blocks("teacher", teacher, few.teacher[v], more.teacher[v], None)
            for v in range(task.demands.teacher_views if teacher else 0)
            if teacher is not None
        ),
        loss_parts=more.loss_parts,
        copies=more.copies,
        unsplit=unsplit,
    )


def try_validation(
    task: Task, contracts: PipelineContracts, inputs: Any, targets: Any, rows: int, ends: Set[int],
    add: Callable[[Any, Any, int], None],
) -> None:  # fmt: skip
    """Evaluate a microbatch of validation data, without a trace left in the models: `add(output, targets, rows)` has its metrics.

    `ends`: of the stages, in blocks. What crosses there must be what crosses in training. Raises `UserError`s.
    """
    model = task.student_blocks
    with untouched(task), torch.no_grad():
        model.in_mode(train=False)
        value = copied(inputs)
        for i, block in enumerate(model.blocks):
            try:
                value = block.call(value)
            except Exception as error:
                views = "; one view of each sample is validated, not all" if task.demands.views > 1 and not i else ""
                raise ModelError(
                    f"validation: student block {i} ('{block.name}') cannot take {describe(value)}: {type(error).__name__}: "
                    f"{error}{views}"
                ) from error
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


def _unsplit(model: BlockModel, views: list[list[Any]]) -> dict[int, str]:
    """Why blocks' backwards have to stay whole; those of the first block are one half anyway: its input has no gradient."""
    reasons: dict[int, str] = {}
    named = [set(model.parameters_of(range(i, i + 1))) for i in range(len(model))]
    for i in range(len(model)):
        if any(named[i] & named[j] for j in range(len(model)) if j != i):
            reasons[i] = "it shares a weight with another block"
    for outputs in views:
        for i in range(1, len(model)):
            parameters = list(model.parameters_of(range(i, i + 1)).values())
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            reason = why_whole(model.blocks[i].call, trained, outputs[i - 1]) if trained and i not in reasons else None
            if reason is not None:
                reasons[i] = reason
    return reasons


def _check_joinable(few: StepValues, more: StepValues) -> None:
    """Refuse outputs that a loss over the whole batch could not get joined, microbatch after microbatch."""
    for rows, values in ((FEW, few), (MORE, more)):
        for output in (outputs[-1] for outputs in (*values.student, *values.teacher)):
            for leaf in pytree.tree_leaves(output):
                if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != rows:
                    raise ModelError(
                        f"a loss over the whole batch joins the outputs of microbatches by their first axis, "
                        f"but for {rows} rows there is {describe(leaf)} in an output; give tensors of one row a sample"
                    )


def check_chain(task: Task, role: str, model: BlockModel, inputs: Any) -> None:
    """Refuse blocks that, one after the other, are not the model: `ModelError` when they give something else.

    Compared in eval mode, where the model's own forward takes the same single value and gives a nest of the same
    form. A model that is called in another way, or that gives something else each time, is what its blocks say.
    """
    chain, again = (_evaluated(task, model, model, inputs) for _ in range(2))
    try:
        whole = _evaluated(task, model, model.model, inputs)
    except Exception:  # it takes other arguments: there is nothing to compare with
        return
    if _alike(chain, again) and _alike(chain, whole) is False:
        raise ModelError(
            f"the {role}'s blocks ({', '.join(block.name for block in model.blocks)}), one after the other, do not "
            f"give what {type(model.model).__name__}.forward gives; put what only its forward does into a block"
        )


def _evaluated(task: Task, model: BlockModel, call: Callable[[Any], Any], inputs: Any) -> Any:
    with untouched(task), torch.no_grad():
        model.model.eval()
        torch.manual_seed(0)
        return call(copied(inputs))


def _alike(one: Any, other: Any) -> bool | None:
    """Whether the tensors of two nests are the same up to rounding; None when their forms differ."""
    (ours, form), (theirs, their_form) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    if form != their_form:
        return None
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
        for a, b in pairs
    )


class _UsesCheck:
    """Refuses a block that trains what it does not name in its `uses`: in another stage, that would be another copy."""

    def __init__(self, model: BlockModel) -> None:
        self.model = model

    def __call__(self, what: str, block: int) -> None:
        """Hear that a piece of a step is done."""
        if what != "backward":
            return
        named = dict(self.model.model.named_parameters())
        mine = {id(p) for p in self.model.parameters_of(range(block, block + 1)).values()}
        others = [name for name, p in named.items() if p.grad is not None and id(p) not in mine]
        if others:
            raise ModelError(
                f"student block {block} ('{self.model.blocks[block].name}') trains {', '.join(map(repr, others[:5]))}"
                f"{' and more' if len(others) > 5 else ''} without naming them in its `uses`; name them there"
            )
        for parameter in named.values():
            parameter.grad = None


def _observe_blocks(
    role: str,
    model: BlockModel,
    few: list[Any],
    more: list[Any],
    gradients: tuple[list[list[Tensor | None]], list[list[Tensor | None]]] | None,
) -> tuple[Contract, ...]:
    return tuple(
        observe(
            f"after {role} block {i} ('{block.name}')",
            few[i],
            more[i],
            (gradients[0][i], gradients[1][i]) if gradients else None,
        )
        for i, block in enumerate(model.blocks)
    )
