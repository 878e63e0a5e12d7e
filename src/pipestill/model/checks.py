"""What a task's blocks must fulfil, beyond taking each other's values, so that a pipeline computes what the model does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pipestill.errors import ModelError
from pipestill.model.blocks import BlockModel
from pipestill.model.nests import copied, describe
from pipestill.model.split import why_whole
from pipestill.model.stepwise import StepValues, untouched
from pipestill.model.tasks import Task
from pipestill.model.tensor_form import FEW, MORE


def check_chain(task: Task, role: str, model: BlockModel, inputs: Any) -> None:
    """Refuse blocks that, called one after the other, do not compute what the model's own forward computes.

    The two are compared in eval mode, where the forward takes the same single value and returns a nest of the same
    structure. A model whose forward takes other arguments, or whose blocks return something else each time, cannot be
    compared and is taken to be what its blocks say.
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
    """Call the blocks or the whole model on a copy of the inputs, in eval mode and from the same random state."""
    with untouched(task), torch.no_grad():
        model.model.eval()
        torch.manual_seed(0)
        return call(copied(inputs))


def _alike(one: Any, other: Any) -> bool | None:
    """Whether the tensors of two nests are equal up to rounding; None when the nests differ in structure."""
    (ours, spec), (theirs, their_spec) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    if spec != their_spec:
        return None
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
        for a, b in pairs
    )


def check_joinable(few: StepValues, more: StepValues) -> None:
    """Refuse outputs that a loss over the whole batch could not get joined from those of its microbatches."""
    for rows, values in ((FEW, few), (MORE, more)):
        for output in (outputs[-1] for outputs in (*values.student, *values.teacher)):
            for leaf in pytree.tree_leaves(output):
                if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != rows:
                    raise ModelError(
                        f"a loss over the whole batch joins the outputs of microbatches by their first axis, "
                        f"but for {rows} rows there is {describe(leaf)} in an output; give tensors of one row a sample"
                    )


class UsesCheck:
    """Refuses a student block that trains a parameter without naming it in its `uses`.

    In a pipeline such a parameter could lie in another stage, where the block would train a copy of it.
    """

    def __init__(self, model: BlockModel) -> None:
        self.model = model

    def __call__(self, what: str, block: int) -> None:
        """Look at the gradients that a block's backward has left, then remove them. Called as each piece of a step ends."""
        if what != "backward":
            return
        named = dict(self.model.model.named_parameters())
        own = {id(p) for p in self.model.parameters_of(range(block, block + 1)).values()}
        others = [name for name, p in named.items() if p.grad is not None and id(p) not in own]
        if others:
            raise ModelError(
                f"student block {block} ('{self.model.blocks[block].name}') trains {', '.join(map(repr, others[:5]))}"
                f"{' and more' if len(others) > 5 else ''} without naming them in its `uses`; name them there"
            )
        for parameter in named.values():
            parameter.grad = None


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
            parameters = list(model.parameters_of(range(i, i + 1)).values())
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            reason = why_whole(model.blocks[i].call, trained, outputs[i - 1]) if trained and i not in reasons else None
            if reason is not None:
                reasons[i] = reason
    return reasons
