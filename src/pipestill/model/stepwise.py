"""One training step taken block by block, with every boundary cut, and nothing left behind in the models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.errors import ModelError
from pipestill.model.blocks import BlockModel
from pipestill.model.boundary import detached
from pipestill.model.nests import describe, distinct_tensors
from pipestill.model.tasks import Task, check_views, teacher_trains, view


@dataclass
class StepValues:
    """The values after each block for one number of rows, in each view, and the gradients of the student's distinct
    tensors.
    """

    student: list[list[Any]]
    gradients: list[list[list[Tensor | None]]]
    teacher: list[list[Any]]
    loss_parts: tuple[str, ...]
    copies: frozenset[int]


@dataclass
class _StudentForward:
    """A student's forward in one view, cut after every block."""

    outputs: list[Any]
    inputs: list[list[tuple[Tensor, int]]]  # of every block, with their versions before it
    cuts: list[tuple[list[Tensor], list[Tensor | None]]]
    last: Any


def stepwise(
    task: Task, inputs: Any, targets: Any, done: Callable[[str, int], None] = lambda what, block: None
) -> StepValues:
    """Forward, loss and backward of one microbatch, cut between all blocks; call inside `untouched`.

    `done(what, block)` is called as each piece ends: "teacher", "student", "loss", "backward"; in every view anew. The
    gradients stay in the models. Raises `ModelError` naming the block or the loss that fails.
    """
    check_views(task, inputs)
    demands = task.demands
    versions = [tensor._version for tensor in distinct_tensors(inputs)]
    taught: list[list[Any]] = []
    if task.teacher_blocks is not None:
        with torch.no_grad():
            taught = [
                _teacher_forward(task.teacher_blocks, view(task, inputs, v), done) for v in range(demands.teacher_views)
            ]
        _check_unwritten("teacher", inputs, versions)
    with torch.enable_grad():
        forwards = [_student_forward(task.student_blocks, view(task, inputs, v), done) for v in range(demands.views)]
        if task.teacher_blocks is not None:
            _check_unwritten("student", inputs, versions)
        parts = _loss(task, [f.last for f in forwards], [values[-1] for values in taught], targets)
        total = torch.stack([part.double() for part in parts.values()]).sum()
        if not total.requires_grad:
            raise ModelError(
                "the loss does not depend on any trained parameter of the student; nothing would be learnt"
            )
        total.backward()
        done("loss", 0)
        for forward in forwards:
            for i in reversed(range(len(forward.outputs))):
                pairs = zip(*forward.cuts[i], strict=True)
                roots = [(tensor, gradient) for tensor, gradient in pairs if gradient is not None]
                if roots:
                    _backward(task.student_blocks, i, roots)
                done("backward", i)
    return StepValues(
        student=[forward.outputs for forward in forwards],
        gradients=[
            [_of_distinct(output, *ends) for output, ends in zip(forward.outputs, forward.cuts, strict=True)]
            for forward in forwards
        ],
        teacher=taught,
        loss_parts=tuple(parts),
        copies=frozenset(
            i
            for forward in forwards
            for i, given in enumerate(forward.inputs)
            if any(t._version != v for t, v in given)
        ),
    )


def _teacher_forward(model: BlockModel, value: Any, done: Callable[[str, int], None]) -> list[Any]:
    values = []
    for i in range(len(model)):
        value = _call("teacher", model, i, value)
        values.append(value)
        done("teacher", i)
    return values


def _student_forward(model: BlockModel, value: Any, done: Callable[[str, int], None]) -> _StudentForward:
    forward = _StudentForward([], [], [], None)
    for i in range(len(model)):
        forward.inputs.append([(tensor, tensor._version) for tensor in distinct_tensors(value)])
        forward.outputs.append(_call("student", model, i, value))
        done("student", i)
        value, tracked, gradients = detached(forward.outputs[-1])
        forward.cuts.append((tracked, gradients))
    forward.last = value
    return forward


def _check_unwritten(role: str, inputs: Any, versions: list[int]) -> None:
    """Refuse a model that writes to the batch: the other model reads it too, before or after."""
    if [tensor._version for tensor in distinct_tensors(inputs)] != versions:
        raise ModelError(
            f"the {role} changes its input in place, and the other model reads it too; "
            f"let the first block of the {role} copy it, or make its first operations not in-place"
        )


def _backward(model: BlockModel, index: int, roots: list[tuple[Tensor, Tensor]]) -> None:
    try:
        torch.autograd.backward([tensor for tensor, _ in roots], [gradient for _, gradient in roots])
    except Exception as error:
        raise ModelError(
            f"the backward of student block {index} ('{model.blocks[index].name}') fails: {type(error).__name__}: {error}"
        ) from error


def _of_distinct(value: Any, tracked: list[Tensor], gradients: list[Tensor | None]) -> list[Tensor | None]:
    """The gradient of each distinct tensor of `value`."""
    known = {id(tensor): gradient for tensor, gradient in zip(tracked, gradients, strict=True)}
    return [known.get(id(tensor)) for tensor in distinct_tensors(value)]


def _call(role: str, model: BlockModel, index: int, value: Any) -> Any:
    block = model.blocks[index]
    try:
        return block.call(value)
    except Exception as error:
        hint = ""
        if index == 0 and not isinstance(value, Tensor):
            hint = "; of what the loader yields, a pair is (inputs, targets) and all else is inputs: see split_batch"
        raise ModelError(
            f"{role} block {index} ('{block.name}') cannot take {describe(value)}: {type(error).__name__}: {error}{hint}"
        ) from error


def _loss(task: Task, student: list[Any], teacher: list[Any], targets: Any) -> dict[str, Tensor]:
    try:
        return task.loss_parts(student, teacher, targets)
    except ModelError:
        raise
    except Exception as error:
        single = task.demands.views == 1
        shown = [describe(values[0] if single else values) for values in (student, teacher) if values]
        given = [f"{who} output {value}" for who, value in zip(("student", "teacher"), shown, strict=False)]
        given.append(f"target {describe(targets)}")
        raise ModelError(
            f"the loss cannot take {', '.join(given)}: {type(error).__name__}: {error}; "
            "make the outputs fit each other, or choose another loss"
        ) from error


@contextmanager
def untouched(task: Task) -> Iterator[None]:
    """The modes of training for student and teacher, and everything put back afterwards: buffers,
    gradients, modes and the random state.
    """
    models: list[nn.Module] = [task.student_blocks.model]
    if task.teacher_blocks is not None:
        models.append(task.teacher_blocks.model)
    if isinstance(task.loss, nn.Module):
        models.append(task.loss)
    with restored(models):
        task.student_blocks.model.train()
        if task.teacher_blocks is not None:
            task.teacher_blocks.model.train(teacher_trains(task))
        yield


@contextmanager
def restored(models: Sequence[nn.Module]) -> Iterator[None]:
    """No gradients at first; afterwards buffers, gradients and modes of `models`, and the random state, as they were."""
    modules = [module for model in models for module in model.modules()]
    modes = [module.training for module in modules]
    buffers = [{name: (b, b if b is None else b.clone()) for name, b in m._buffers.items()} for m in modules]
    gradients = [(p, p.grad) for model in models for p in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, mode, saved in zip(modules, modes, buffers, strict=True):
            module.training = mode
            module._buffers.clear()  # a forward may have put new tensors in their place
            for name, (buffer, content) in saved.items():
                module._buffers[name] = buffer
                if buffer is not None and content is not None:
                    with torch.no_grad():
                        buffer.copy_(content)
        for parameter, gradient in gradients:
            parameter.grad = gradient
