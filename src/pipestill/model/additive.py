"""Whether the losses of microbatches add up to the loss of their batch: tried out on the outputs of a few rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pipestill.errors import ModelError
from pipestill.model.contracts import FEW, MORE, LinearInRows
from pipestill.model.nests import copied, distinct_tensors
from pipestill.model.stepwise import StepValues, restored
from pipestill.model.tasks import Task

_RELATIVE = 1e-3
"""The largest difference that is rounding: sound losses agree to 2e-7 in float32, and those that compare rows are off by 0.1."""
_ABSOLUTE = 1e-5
"""Likewise, for losses near 0: the divergence of two models that agree is rounding and nothing else."""

_Given = tuple[list[Any], list[Any], Any]
"""The student's outputs and the teacher's, by view, and the targets, of some rows."""


class _Unknown(Exception):
    """It cannot be told whether a loss adds up."""


def check_additive(task: Task, few: StepValues, more: StepValues, targets: Sequence[Any]) -> None:
    """Refuse a loss whose parts for `FEW` and for `MORE` rows do not add up to those of all these rows together.

    That is so of losses that compare rows with each other, and of means over something else than rows. The losses are those of
    given outputs: what the models do with their rows does not matter. No loss is refused that draws random numbers or remembers
    what it saw, nor where the outputs of all rows do not follow from those of some.

    Args:
        task: whose loss it is
        few: what crossed boundaries with `FEW` rows
        more: what did with `MORE` rows
        targets: those of the few rows, and those of the more rows
    """
    given = [
        ([view[-1] for view in values.student], [view[-1] for view in values.teacher], target)
        for values, target in zip((few, more), targets, strict=True)
    ]
    try:
        counts = [task.loss_counts(target) for target in (*targets, _joined(*targets))]
        _check_counts(*counts)
        coarsest = max((torch.finfo(t.dtype).eps for t in distinct_tensors(given[1]) if t.is_floating_point()), default=0.0)
        wrong = _off(_losses(task, given, None), counts, max(_RELATIVE, 8 * coarsest))
    except _Unknown:
        return
    if wrong:
        with suppress(_Unknown):  # a loss that takes no float64 is judged in its own precision
            wrong = _off(_losses(task, given, torch.float64), counts, _RELATIVE)
    if wrong:
        raise ModelError("; ".join(wrong))


def _check_counts(few: Mapping[str, float], more: Mapping[str, float], whole: Mapping[str, float]) -> None:
    """Refuse counts of which those of some rows and of others are not together those of all."""
    for name, count in whole.items():
        if not math.isclose(count, few[name] + more[name], rel_tol=1e-5, abs_tol=1e-9):
            raise ModelError(
                f"the loss's counts(target) gave {few[name]:g} for '{name}' of {FEW} rows, {more[name]:g} of {MORE} others, and "
                f"{count:g} of all {FEW + MORE} together; expected their sum: let it count, or add up weights, over the rows"
            )


def _off(losses: Sequence[Mapping[str, float]], counts: Sequence[Mapping[str, float]], relative: float) -> list[str]:
    """What is wrong with each part of a loss whose values for few, for more and for all rows do not add up."""
    few, more, whole = losses
    problems = []
    for name in whole:
        count = counts[-1].get(name)
        if count == 0.0 or not math.isfinite(whole[name]):
            continue
        together, added = whole[name], (FEW * few[name] + MORE * more[name]) / (FEW + MORE)
        if count is not None:
            together, added = whole[name] / count, (few[name] + more[name]) / count
        if abs(together - added) <= relative * max(abs(together), abs(added)) + _ABSOLUTE:
            continue
        if count is not None:
            problems.append(
                f"the loss counts its part '{name}', so it has to be a sum over what counts, and it is {few[name]:.6g} of {FEW} "
                f"rows, {more[name]:.6g} of {MORE} others and {whole[name]:.6g} of all {FEW + MORE} together; add up, do not "
                "average (reduction='sum'), and compare no rows with each other"
            )
        else:
            problems.append(
                f"the loss ('{name}') of {FEW + MORE} rows is {together:.6g}, and the mean of those of {FEW} and of {MORE} of "
                f"them is {added:.6g}, so it would change with the number of microbatches: it compares rows with each other, or "
                "is no mean over rows. Give the task batch_loss=True, and the loss gets the whole batch at "
                "once; or, if it is a mean over tokens with a label or over class weights, say, let it add up, with "
                "ps.losses.counted"
            )
    return problems


def _losses(task: Task, given: Sequence[_Given], dtype: torch.dtype | None) -> list[dict[str, float]]:
    """The parts of the loss for few, for more and for all rows, with outputs of `dtype` (None: their own)."""

    def joined() -> _Given:
        (s, t, target), (others, taught, more) = given
        pairs = [[_joined(*pair) for pair in zip(a, b, strict=True)] for a, b in ((s, others), (t, taught))]
        return pairs[0], pairs[1], _joined(target, more)

    makes: list[Callable[[], _Given]] = [*((lambda one=one: copied(one)) for one in given), joined, joined]
    *found, again = (_evaluated(task, make, dtype) for make in makes)
    if any(one.keys() != again.keys() for one in found) or any(again[n] != v and not math.isnan(v) for n, v in found[-1].items()):
        raise _Unknown  # it remembers what it saw, or draws random numbers of its own
    return found


def _evaluated(task: Task, make: Callable[[], _Given], dtype: torch.dtype | None) -> dict[str, float]:
    """The parts of the loss of outputs and targets of its own, from one random state and without a trace in its buffers."""
    modules = [task.loss] if isinstance(task.loss, nn.Module) else []
    with restored(modules), torch.no_grad():
        torch.manual_seed(0)
        start = torch.random.get_rng_state()
        given = make()
        if dtype is not None:
            given = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, given)
        try:
            parts = task.loss_parts(*given)
        except Exception as error:  # outputs put together may not be what a model would give
            raise _Unknown from error
        if not torch.equal(torch.random.get_rng_state(), start):
            raise _Unknown
        return {name: float(part) for name, part in parts.items()}


def _joined(few: Any, more: Any) -> Any:
    """A nest of all rows from one of the few and one of the more; `_Unknown` where they do not tell what it would be."""
    (ours, spec), (theirs, other) = pytree.tree_flatten(few), pytree.tree_flatten(more)
    if spec != other:
        raise _Unknown
    return pytree.tree_unflatten([_joined_leaf(a, b) for a, b in zip(ours, theirs, strict=True)], spec)


def _joined_leaf(few: Any, more: Any) -> Any:
    if not isinstance(few, Tensor) or not isinstance(more, Tensor):
        if type(few) is int and type(more) is int:
            return LinearInRows.between(few, more).of(FEW + MORE)
        if isinstance(few, Tensor) or isinstance(more, Tensor) or (few is not more and few != more):
            raise _Unknown
        return few
    if few.dim() != more.dim() or few.dtype != more.dtype:
        raise _Unknown
    growing = [axis for axis, (a, b) in enumerate(zip(few.shape, more.shape, strict=True)) if a != b]
    if not growing and torch.equal(few, more):
        return few.detach().clone()
    if len(growing) != 1 or few.shape[growing[0]] * MORE != more.shape[growing[0]] * FEW:
        raise _Unknown  # a number that follows from all rows, say
    return torch.cat([few.detach(), more.detach()], growing[0])
