"""Whether the losses of microbatches add up to the loss of their batch: tried out on the outputs of a few rows."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from pipestill.errors import ModelError
from pipestill.model.contracts import FEW, MORE, LinearInRows, same
from pipestill.model.nests import copied, distinct_tensors
from pipestill.model.stepwise import StepValues, restored
from pipestill.model.tasks import Task

_RELATIVE = 1e-3
"""The largest difference that is rounding: sound losses agree to 2e-7 in float32, and those that compare rows are off by 0.1."""
_ABSOLUTE = 1e-5
"""Likewise, for losses near 0: the divergence of two models that agree is rounding and nothing else."""

_Loss = Callable[[Any], Mapping[str, Tensor]]
"""From a nest of what a loss takes of some rows to its parts."""


class _Unknown(Exception):
    """It cannot be told whether a loss adds up."""


def check_additive(task: Task, few: StepValues, more: StepValues, targets: Sequence[Any]) -> None:
    """Refuse a loss whose parts for `FEW` and for `MORE` rows do not add up to those of all these rows together.

    That is so of losses that compare rows with each other, and of means over something else than rows. The losses are those of
    given outputs: what the models do with their rows does not matter. No loss is refused that draws random numbers or remembers
    what it saw, nor where the outputs of all rows do not follow from those of some. Batch norm inside a loss is left out.

    Args:
        task: whose loss it is
        few: what crossed boundaries with `FEW` rows
        more: what did with `MORE` rows
        targets: those of the few rows, and those of the more rows
    """
    counts = [task.loss_counts(target) for target in targets]
    with suppress(_Unknown):
        _check_counts(counts[0], counts[1], task.loss_counts(_joined(*targets)))
    found = {name: counts[0][name] + count for name, count in counts[1].items()}
    features, wrong = task.feature_losses, list[str]()
    modules = [module for module in (task.loss, *(b.module for b in features.beside)) if isinstance(module, nn.Module)]
    for loss, taken in _taken(task):
        given = [(*taken(values), target) for values, target in zip((few, more), targets, strict=True)]
        wrong += _wrong(loss, given, found, modules)
    if wrong:
        raise ModelError("; ".join(wrong))


def _taken(task: Task) -> Iterator[tuple[_Loss, Callable[[StepValues], tuple[Any, Any]]]]:
    """The loss of a task's outputs, and the feature losses of each block, with what each takes of the values of a step."""
    yield lambda given: task.loss_parts(*given), lambda values: ([v[-1] for v in values.student], [v[-1] for v in values.teacher])
    for block in task.feature_losses.student_blocks:
        yield partial(_feature_parts, task, block), partial(_features, block)


def _features(block: int, values: StepValues) -> tuple[Any, Any]:
    return values.student[0][block], dict(enumerate(values.taps))


def _feature_parts(task: Task, block: int, given: Any) -> Mapping[str, Tensor]:
    value, taken, target = given
    return task.feature_losses.parts(block, [value], [taken], target)


def _wrong(loss: _Loss, given: Sequence[Any], counts: Mapping[str, float], modules: Sequence[nn.Module]) -> list[str]:
    """What is wrong with the parts of a loss for what is `given` of few and of more rows; `counts` are those of all of them."""
    tensors = [tensor for tensor in distinct_tensors(given[1]) if tensor.is_floating_point()]
    coarsest = max((torch.finfo(tensor.dtype).eps for tensor in tensors), default=0.0)
    try:
        wrong = _off(_losses(loss, given, modules, None), counts, max(_RELATIVE, 8 * coarsest))
    except _Unknown:
        return []
    if wrong:
        with suppress(_Unknown):  # a loss that takes no float64 is judged in its own precision
            return _off(_losses(loss, given, modules, torch.float64), counts, _RELATIVE)
    return wrong


def _check_counts(few: Mapping[str, float], more: Mapping[str, float], whole: Mapping[str, float]) -> None:
    """Refuse counts of which those of some rows and of others are not together those of all."""
    for name, count in whole.items():
        if not math.isclose(count, few[name] + more[name], rel_tol=1e-5, abs_tol=1e-9):
            raise ModelError(
                f"the loss's counts(target) gave {few[name]:g} for '{name}' of {FEW} rows, {more[name]:g} of {MORE} others, and "
                f"{count:g} of all {FEW + MORE} together; expected their sum: let it count, or add up weights, over the rows"
            )


def _off(losses: Sequence[Mapping[str, float]], counts: Mapping[str, float], relative: float) -> list[str]:
    """What is wrong with the parts of a loss whose values for few, for more and for all rows do not add up."""
    few, more, whole = losses
    problems = []
    for name in whole:
        count = counts.get(name)
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


def _losses(loss: _Loss, given: Sequence[Any], modules: Sequence[nn.Module], dtype: torch.dtype | None) -> list[dict[str, float]]:
    """The parts of a loss for few, for more and for all rows, with numbers of `dtype` (None: their own)."""
    makes: list[Callable[[], Any]] = [*(partial(copied, one) for one in given), *[partial(_joined, *given)] * 2]
    *found, again = (_evaluated(loss, make, modules, dtype) for make in makes)
    if any(one.keys() != again.keys() for one in found) or any(again[n] != v and not math.isnan(v) for n, v in found[-1].items()):
        raise _Unknown  # it remembers what it saw, or draws random numbers of its own
    return found


def _evaluated(loss: _Loss, make: Callable[[], Any], modules: Sequence[nn.Module], dtype: torch.dtype | None) -> dict[str, float]:
    """The parts of a loss of tensors of its own, from one random state and without a trace in the buffers of `modules`."""
    with restored(modules), torch.no_grad():
        for module in (part for whole in modules for part in whole.modules() if isinstance(part, _BatchNorm)):
            module.eval()  # a projector's, say: it normalises over a microbatch, as the models' own do
        torch.manual_seed(0)
        start = torch.random.get_rng_state()
        given = make()
        if dtype is not None:
            given = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, given)
        try:
            parts = loss(given)
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
        if not same(few, more):
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
