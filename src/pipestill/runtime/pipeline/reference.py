"""The reference strategy: a plain loop on one device, which every other strategy has to equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.model.batchnorm import Norms
from pipestill.model.blocks import BlockModel
from pipestill.model.boundary import detached
from pipestill.model.nests import copied, rows_of, to_device
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.seeding import seed_block
from pipestill.model.tasks import Momentum, Task, teacher_trains, view
from pipestill.optim import Schedules
from pipestill.runtime.batch import Batch, microbatch_rows
from pipestill.runtime.pipeline.stage import (
    clip,
    evaluate_loss,
    gradient_squares,
    run_blocks,
    weighted_loss,
)
from pipestill.runtime.pipeline.weights import MovingAverage
from pipestill.schedule import Role


def reference(
    task: Task,
    contracts: PipelineContracts,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    microbatches: int,
    schedules: Schedules,
    seed: int,
    device: torch.device,
    before_update: Callable[[int, Batch, dict[str, float]], None],
    after_update: Callable[[int, Batch], None],
    norms: Norms,
    largest_norm: float | None = None,
    staleness: int = 0,
    student_staleness: int = 0,
    first_step: int = 0,
) -> None:
    """Train on all batches, accumulating the same microbatches in the same order as a pipeline; no schedule at all.

    With a `staleness`, step k reads the weights that the teacher (or the student) had one update before, kept as copies.
    """
    student, teacher, demands = task.student_blocks, task.teacher_blocks, task.demands
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    rates = schedules.rates(optimizer)
    average = MovingAverage(task, range(len(task.teacher_blocks))) if isinstance(task, Momentum) else None
    old_student = Previous(trained, student_staleness)
    old_teacher = Previous([mine for mine, _ in average.pairs] if average else [], staleness)
    if isinstance(task.loss, nn.Module):
        task.loss.to(device)
    student.in_mode(train=False)
    student.in_mode(train=True)  # anew: some layers may stay in eval mode
    student.model.zero_grad(set_to_none=True)

    def forward(role: Role, rows: Any, step: int, unit: int) -> Any:
        model = teacher if role is Role.TEACHER else student
        assert model is not None
        return run_blocks(model, range(len(model)), rows, role, seed=seed, step=step, unit=unit, device=device)

    for step, batch in enumerate(batches, first_step):
        losses: dict[str, float] = {}
        parts = [part for part in microbatch_rows(batch.rows, microbatches) if part.start < part.stop]
        together = [list(enumerate(parts))] if demands.batch_loss else [[item] for item in enumerate(parts)]
        for number, group in enumerate(together):
            taught, learnt = dict[int, Any](), dict[int, Any]()
            for m, part in group:
                inputs = [to_device(rows_of(view(task, batch.inputs, v), part), device) for v in range(demands.views)]
                if teacher is not None:
                    teacher.in_mode(teacher_trains(task))
                    with torch.no_grad(), old_teacher:
                        for v in range(demands.teacher_views):
                            unit = m * demands.teacher_views + v
                            taught[unit] = forward(Role.TEACHER, inputs[v], step, unit)
                for v, rows in enumerate(inputs):
                    with old_student:
                        learnt[m * demands.views + v] = forward(
                            Role.STUDENT, copied(rows) if 0 in contracts.copies else rows, step, m * demands.views + v
                        )
            seed_block(seed, Role.STUDENT, len(student), step, number, device)
            whole = slice(group[0][1].start, group[-1][1].stop)
            share = (whole.stop - whole.start) / batch.rows
            cuts = {unit: detached(output) for unit, output in learnt.items()}
            target = to_device(rows_of(batch.targets, whole), device)
            loss = evaluate_loss(task, {unit: value for unit, (value, _, _) in cuts.items()}, taught, target)
            weighted_loss(loss, share).backward()
            for _, outputs, gradients in cuts.values():
                roots = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
                with old_student:
                    torch.autograd.backward([output for output, _ in roots], [gradient for _, gradient in roots])
            for name, value in loss.items():
                losses[name] = losses.get(name, 0.0) + float(value.detach().double()) * share
        for model in (student, teacher) if teacher is not None else (student,):
            norms.end_batch(model.model.modules())
        before_update(step, batch, losses)
        rates.set(step)
        if largest_norm is not None:
            clip(trained, gradient_squares(p for p in student.model.parameters() if p.requires_grad), largest_norm)
        with old_student.update():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.note()
            with old_teacher.update():
                average.move(step)
        after_update(step, batch)


class Previous:
    """Within it, tensors hold what they held before their last update, if `staleness` is 1."""

    def __init__(self, tensors: list[Tensor], staleness: int) -> None:
        self.tensors = tensors if staleness else []
        self.old = [tensor.detach().clone() for tensor in self.tensors]

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *error: object) -> None:
        self._swap()

    def _swap(self) -> None:
        for i, tensor in enumerate(self.tensors):
            self.old[i], tensor.data = tensor.data, self.old[i]

    @contextmanager
    def update(self) -> Iterator[None]:
        """Update the tensors in the body; what they held before it is what is old then."""
        before = [tensor.detach().clone() for tensor in self.tensors]
        yield
        self.old = before


def evaluate(
    student: BlockModel,
    batches: Iterator[Batch],
    add: Callable[[Any, Any, int], None],
    *,
    microbatches: int,
    seed: int,
    device: torch.device,
) -> None:
    """Call `add(output, target, rows)` for each microbatch of a validation, in eval mode and without gradients."""
    student.in_mode(train=False)
    with torch.no_grad():
        for step, batch in enumerate(batches):
            for m, part in enumerate(microbatch_rows(batch.rows, microbatches)):
                if part.start < part.stop:
                    inputs, target = (to_device(rows_of(v, part), device) for v in (batch.inputs, batch.targets))
                    output = run_blocks(
                        student, range(len(student)), inputs, Role.STUDENT,
                        seed=seed, step=step, unit=m, device=device,
                    )  # fmt: skip
                    add(output, target, part.stop - part.start)
    student.in_mode(train=True)
