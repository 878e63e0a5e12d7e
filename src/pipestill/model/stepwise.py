"""One training step taken block by block, with every boundary cut, and nothing left behind in the models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pipestill.errors import ModelError
from pipestill.model.blocks import BlockModel
from pipestill.model.boundary import cut, distinct_tensors
from pipestill.model.tasks import Task


@dataclass
class Values:
    """The values after each block for one number of rows, and the gradients of the student's distinct tensors."""

    student: list[Any]
    gradients: list[list[Tensor | None]]
    teacher: list[Any]
    loss_parts: tuple[str, ...]
    copies: frozenset[int]


def stepwise(
    task: Task, inputs: Any, targets: Any, done: Callable[[str, int], None] = lambda what, block: None
) -> Values:
    """Forward, loss and backward of one microbatch, cut between all blocks; call inside `untouched`.

    `done(what, block)` is called as each piece ends: "teacher", "student", "loss", "backward". The gradients stay in the
    models. Raises `ModelError` naming the block or the loss that fails.
    """
    teacher_values: list[Any] = []
    versions = [tensor._version for tensor in distinct_tensors(inputs)]
    if task.teacher_blocks is not None:
        with torch.no_grad():
            value = inputs
            for i in range(len(task.teacher_blocks)):
                value = _call("teacher", task.teacher_blocks, i, value)
                teacher_values.append(value)
                done("teacher", i)
        _check_unwritten("teacher", inputs, versions)
    outputs: list[Any] = []
    inputs_of: list[list[tuple[Tensor, int]]] = []  # of every block, with their versions before it
    cuts: list[tuple[list[Tensor], list[Tensor | None]]] = []
    value = inputs
    with torch.enable_grad():
        for i in range(len(task.student_blocks)):
            inputs_of.append([(tensor, tensor._version) for tensor in distinct_tensors(value)])
            outputs.append(_call("student", task.student_blocks, i, value))
            done("student", i)
            value, tracked, gradients = cut(outputs[-1])
            cuts.append((tracked, gradients))
        if task.teacher_blocks is not None:
            _check_unwritten("student", inputs, versions)
        parts = _loss(task, value, teacher_values[-1] if teacher_values else None, targets)
        total = torch.stack([part.double() for part in parts.values()]).sum()
        if not total.requires_grad:
            raise ModelError(
                "the loss does not depend on any trained parameter of the student; nothing would be learnt"
            )
        total.backward()
        done("loss", 0)
        for i in reversed(range(len(outputs))):
            roots = [(tensor, gradient) for tensor, gradient in zip(*cuts[i], strict=True) if gradient is not None]
            if roots:
                _backward(task.student_blocks, i, roots)
            done("backward", i)
    return Values(
        student=outputs,
        gradients=[_of_distinct(output, *ends) for output, ends in zip(outputs, cuts, strict=True)],
        teacher=teacher_values,
        loss_parts=tuple(parts),
        copies=frozenset(i for i, given in enumerate(inputs_of) if any(t._version != v for t, v in given)),
    )


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
        raise ModelError(
            f"{role} block {index} ('{block.name}') cannot take {describe(value)}: {type(error).__name__}: {error}"
        ) from error


def _loss(task: Task, student: Any, teacher: Any, targets: Any) -> dict[str, Tensor]:
    try:
        return task.loss_parts(student, teacher, targets)
    except ModelError:
        raise
    except Exception as error:
        given = [f"student output {describe(student)}", f"target {describe(targets)}"]
        if task.teacher_blocks is not None:
            given.insert(1, f"teacher output {describe(teacher)}")
        raise ModelError(
            f"the loss cannot take {', '.join(given)}: {type(error).__name__}: {error}; "
            "make the outputs fit each other, or choose another loss"
        ) from error


def describe(value: Any) -> str:
    """Types and shapes of a nest, for messages."""
    shown = pytree.tree_map(
        lambda x: f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else repr(x), value
    )
    return str(shown).replace("'", "")


@contextmanager
def untouched(task: Task) -> Iterator[None]:
    """Train mode for the student and eval mode for the teacher, and everything put back afterwards: buffers,
    gradients, modes and the random state.
    """
    models: list[nn.Module] = [task.student_blocks.model]
    if task.teacher_blocks is not None:
        models.append(task.teacher_blocks.model)
    if isinstance(task.loss, nn.Module):
        models.append(task.loss)
    modules = [module for model in models for module in model.modules()]
    modes = [module.training for module in modules]
    buffers = [{name: (b, b if b is None else b.clone()) for name, b in m._buffers.items()} for m in modules]
    gradients = [(p, p.grad) for model in models for p in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    task.student_blocks.model.train()
    if task.teacher_blocks is not None:
        task.teacher_blocks.model.eval()
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
