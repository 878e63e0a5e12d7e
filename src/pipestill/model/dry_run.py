"""One tiny training step, before anything starts: learns every boundary's contract and finds what cannot work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pipestill.errors import ModelError
from pipestill.model.blocks import BlockModel
from pipestill.model.boundary import FEW, MORE, Contract, copied, distinct_tensors, learn, num_rows, rows_of
from pipestill.model.stepwise import stepwise, untouched
from pipestill.model.tasks import Task


@dataclass(frozen=True)
class Contracts:
    """Every contract of a task: what crosses after each block, and what a batch is made of.

    `copies` holds the student blocks whose input is written to in place, by themselves or by a block after them. The
    first one gets a copy of its rows then: microbatches are parts of one batch, and autograd looks after it as a whole.
    """

    inputs: Contract
    targets: Contract
    student: tuple[Contract, ...]
    teacher: tuple[Contract, ...]
    loss_parts: tuple[str, ...]
    copies: frozenset[int]


def dry_run(task: Task, inputs: Any, targets: Any) -> Contracts:
    """Run forward, loss and backward on 2 and on 3 rows of a sample batch, without a trace left in the models.

    Raises `ModelError` naming the block or the loss that fails, or the boundary that changes with more than its rows.
    """
    rows = num_rows(inputs, "the batch's inputs")
    if distinct_tensors(targets) and num_rows(targets, "the batch's targets") != rows:
        raise ModelError(f"the batch has {rows} rows of inputs and {num_rows(targets, 'targets')} of targets")
    values = []
    with untouched(task):
        for count in (FEW, MORE):
            index = torch.arange(count) % rows
            values.append((rows_of(inputs, index), rows_of(targets, index)))
        few, more = (stepwise(task, *value, _UsesCheck(task.student_blocks)) for value in values)
    teacher = task.teacher_blocks
    check_chain(task, "student", task.student_blocks, values[1][0])
    if teacher is not None:
        check_chain(task, "teacher", teacher, values[1][0])
    return Contracts(
        inputs=learn("the batch's inputs", values[0][0], values[1][0]),
        targets=learn("the batch's targets", values[0][1], values[1][1]),
        student=_learn_all("student", task.student_blocks, few.student, more.student, (few.gradients, more.gradients)),
        teacher=_learn_all("teacher", teacher, few.teacher, more.teacher, None) if teacher else (),
        loss_parts=more.loss_parts,
        copies=more.copies,
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


def _learn_all(
    role: str,
    model: BlockModel,
    few: list[Any],
    more: list[Any],
    gradients: tuple[list[list[Tensor | None]], list[list[Tensor | None]]] | None,
) -> tuple[Contract, ...]:
    return tuple(
        learn(
            f"after {role} block {i} ('{block.name}')",
            few[i],
            more[i],
            (gradients[0][i], gradients[1][i]) if gradients else None,
        )
        for i, block in enumerate(model.blocks)
    )
