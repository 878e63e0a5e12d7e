"""Takes one training step block by block, with the graph divided at every boundary, and leaves no trace in the models."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.errors import ModelError
from pipestill.model.blocks import BlockModel
from pipestill.model.boundary import Detached, detached, with_exit
from pipestill.model.nests import describe, distinct_tensors, watched
from pipestill.model.remembered import Remembered, modes_and_buffers
from pipestill.model.tasks import Task, check_views, teacher_trains, view

OnDone = Callable[[str, int], None]
"""Called as each piece of a step ends, in every view anew, with the piece's kind ("teacher", "student", "loss" or "backward")
and its block (0 for the loss)."""


@dataclass(frozen=True)
class StepValues:
    """Everything that crossed boundaries in one step with one number of rows."""

    student: list[list[Any]]
    """By view, then by block: the value after each student block."""
    gradients: list[list[list[Tensor | None]]]
    """By view, then by block: the gradient of each distinct tensor of that value, None where there is none."""
    teacher: list[list[Any]]
    """By view that the teacher sees, then by block: the value after each teacher block."""
    loss_parts: tuple[str, ...]
    """The names of the loss's parts, in its order."""
    copies: frozenset[int]
    """The student blocks whose input was written to in place, by themselves or by a later block."""
    feature_parts: tuple[tuple[str, ...], ...] = ()
    """The names of the parts of feature losses, for each student block that has some, in order."""
    taps: tuple[Tensor, ...] = ()
    """The teacher's tensors that feature losses take."""
    teacher_copies: frozenset[int] = frozenset()
    """The teacher blocks whose output was written to in place by a later block."""


@dataclass
class _TeacherForward:
    """A teacher's forward in one view."""

    values: list[Any] = field(default_factory=list)
    """After each block."""
    written: list[Callable[[], bool]] = field(default_factory=list)
    """For each block: whether its output was written to in place since."""
    taken: dict[int, Tensor] = field(default_factory=dict)
    """What feature losses take, by tap."""


@dataclass
class _StudentForward:
    """A student's forward in one view, its graph divided after every block."""

    written: list[Callable[[], bool]] = field(default_factory=list)
    """For each block: whether its input was written to in place since."""
    outputs: list[Any] = field(default_factory=list)
    ends: list[Detached] = field(default_factory=list)
    """Each output as the start of the next block's graph."""
    exits: dict[int, Detached] = field(default_factory=dict)
    """By block that feature losses compare: its output as the start of their graph."""


def stepwise(task: Task, inputs: Any, targets: Any, done: OnDone = lambda what, block: None) -> StepValues:
    """Take forward, loss and backward of one microbatch, block by block; call it inside `untouched`.

    The gradients of parameters stay in the models. Raises `ModelError` that names the block or the loss that fails.
    """
    check_views(task, inputs)
    demands = task.demands
    written = watched(inputs)
    taught: list[_TeacherForward] = []
    if task.teacher_blocks is not None:
        teacher = task.teacher_blocks
        with torch.no_grad():
            taught = [_teacher_forward(task, teacher, view(task, inputs, v), done) for v in range(demands.teacher_views)]
        _check_unwritten("teacher", written())
    with torch.enable_grad():
        forwards = [_student_forward(task, view(task, inputs, v), done) for v in range(demands.views)]
        if task.teacher_blocks is not None:
            _check_unwritten("student", written())
        parts = _loss(task, [f.ends[-1].value for f in forwards], [forward.values[-1] for forward in taught], targets)
        total = torch.stack([part.double() for part in parts.values()]).sum()
        if total.requires_grad:
            total.backward()
        elif not task.feature_losses.pairs:
            raise ModelError("the loss does not depend on any trained parameter of the student; nothing would be learnt")
        done("loss", 0)
        feature_parts = []
        for block in task.feature_losses.student_blocks:
            feature_parts.append(_feature_losses(task, block, forwards[0].exits[block], taught[0].taken, targets))
            done("feature", block)
        for forward in forwards:
            for i in reversed(range(len(task.student_blocks))):
                _backward(task.student_blocks, i, forward.ends[i], forward.exits.get(i))
                done("backward", i)
    return StepValues(
        student=[forward.outputs for forward in forwards],
        gradients=[[_of_distinct(*pair) for pair in zip(forward.outputs, forward.ends, strict=True)] for forward in forwards],
        teacher=[forward.values for forward in taught],
        loss_parts=tuple(parts),
        copies=frozenset(i for forward in forwards for i, written in enumerate(forward.written) if written()),
        feature_parts=tuple(feature_parts),
        taps=tuple(taught[0].taken[number] for number in range(len(task.feature_losses.taps))),
        teacher_copies=frozenset(i for forward in taught for i, written in enumerate(forward.written) if written()),
    )


def _teacher_forward(task: Task, model: BlockModel, value: Any, done: OnDone) -> _TeacherForward:
    """Run the teacher's blocks."""
    forward = _TeacherForward()
    for i in range(len(model)):
        value = call_block("teacher", model, i, value)
        done("teacher", i)
        forward.values.append(value)
        forward.written.append(watched(value))
        forward.taken |= task.feature_losses.taken(i, value, copied=True)
    return forward


def _student_forward(task: Task, value: Any, done: OnDone) -> _StudentForward:
    """Run the student's blocks, each in a graph of its own."""
    model, compared = task.student_blocks, task.feature_losses.student_blocks
    forward = _StudentForward()
    for i in range(len(model)):
        forward.written.append(watched(value))
        forward.outputs.append(call_block("student", model, i, value))
        done("student", i)
        forward.ends.append(detached(forward.outputs[-1]))
        if i in compared:
            forward.exits[i] = detached(forward.outputs[-1], copies=True)
        value = forward.ends[-1].value
    return forward


def _check_unwritten(role: str, written: bool) -> None:
    """Refuse a model that writes to the batch: the other model reads the batch too, before or after."""
    if written:
        raise ModelError(
            f"the {role} changes its input in place, and the other model reads it too; "
            f"let the first block of the {role} copy it, or make its first operations not in-place"
        )


def _feature_losses(task: Task, block: int, exit: Detached, taken: dict[int, Tensor], targets: Any) -> tuple[str, ...]:
    """Take the feature losses of a student's block and their backward; the names of their parts."""
    try:
        parts = task.feature_losses.parts(block, [exit.value], [taken], targets)
    except ModelError:
        raise
    except Exception as error:
        pairs = [pair for pair in task.feature_losses.pairs if pair.student == block]
        theirs = ", ".join(describe(taken[pair.tap]) for pair in pairs)
        raise ModelError(
            f"{pairs[0].where}: the loss cannot take {describe(exit.value)} of the student and {theirs} of the teacher: "
            f"{type(error).__name__}: {error}; make them fit each other (project=True for other widths), or choose another loss"
        ) from error
    total = torch.stack([part.double() for part in parts.values()]).sum()
    if not total.requires_grad:
        name = task.student_blocks.blocks[block].name
        raise ModelError(f"a feature loss does not depend on student block {block} ('{name}'); nothing would be learnt from it")
    total.backward()
    return tuple(parts)


def _backward(model: BlockModel, index: int, end: Detached, exit: Detached | None) -> None:
    """Run one block's backward from the gradients that came back for its output, where any did."""
    roots = with_exit(zip(end.tracked, end.gradients, strict=True), exit)
    if not roots:
        return
    try:
        torch.autograd.backward([tensor for tensor, _ in roots], [gradient for _, gradient in roots])
    except Exception as error:
        raise ModelError(
            f"the backward of student block {index} ('{model.blocks[index].name}') fails: {type(error).__name__}: {error}"
        ) from error


def _of_distinct(value: Any, end: Detached) -> list[Tensor | None]:
    """The gradient of each distinct tensor of `value`."""
    known = {id(tensor): gradient for tensor, gradient in zip(end.tracked, end.gradients, strict=True)}
    return [known.get(id(tensor)) for tensor in distinct_tensors(value)]


def call_block(role: str, model: BlockModel, index: int, value: Any, hint: str | None = None) -> Any:
    """Call one block; `ModelError` that names the block, describes its input and ends with a hint where it fails."""
    block = model.blocks[index]
    if hint is None and index == 0 and not isinstance(value, Tensor):
        hint = "; of what the loader yields, a pair is (inputs, targets) and all else is inputs: see split_batch"
    try:
        return block.call(value)
    except Exception as error:
        raise ModelError(
            f"{role} block {index} ('{block.name}') cannot take {describe(value)}: {type(error).__name__}: {error}{hint or ''}"
        ) from error


def _loss(task: Task, student: list[Any], teacher: list[Any], targets: Any) -> dict[str, Tensor]:
    """Compute the loss's parts; `ModelError` that describes outputs and targets where it fails."""
    try:
        return task.loss_parts(student, teacher, targets)
    except ModelError:
        raise
    except Exception as error:
        single = task.demands.views == 1
        shown = [describe(values[0] if single else values) for values in (student, teacher) if values]
        given = [f"{role} output {value}" for role, value in zip(("student", "teacher"), shown, strict=False)]
        given.append(f"target {describe(targets)}")
        raise ModelError(
            f"the loss cannot take {', '.join(given)}: {type(error).__name__}: {error}; "
            "make the outputs fit each other, or choose another loss"
        ) from error


def modules_of(task: Task) -> list[nn.Module]:
    """List the modules of a task: the student, the teacher where there is one, and the loss where it is a module."""
    teacher = None if task.teacher_blocks is None else task.teacher_blocks.model
    given = (task.student, teacher, task.loss, *(beside.module for beside in task.feature_losses.beside))
    return [module for module in given if isinstance(module, nn.Module)]


@contextmanager
def untouched(task: Task) -> Iterator[None]:
    """Run the body with the task's models in their training modes, and leave no trace in models, loss and random state."""
    with restored(modules_of(task), [task.loss, *(pair.term.loss for pair in task.feature_losses.pairs)]):
        task.student_blocks.model.train()
        if task.teacher_blocks is not None:
            task.teacher_blocks.model.train(teacher_trains(task))
        yield


@contextmanager
def restored(models: Sequence[nn.Module], losses: Sequence[object] = ()) -> Iterator[None]:
    """Run the body with no gradients in `models`; then put back their buffers, gradients and modes, and the random state.

    What `losses` remember in Python, such as how often they were called, is put back too.
    """
    apart = [model for model in models if not any(model is loss for loss in losses)]
    remembered = Remembered(losses, apart)
    gradients = [(p, p.grad) for model in models for p in model.parameters()]
    for model in models:
        model.zero_grad()
    try:
        with modes_and_buffers(models), torch.random.fork_rng():
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        remembered.put_back()
