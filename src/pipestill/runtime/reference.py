"""The reference strategy: a plain loop on one device, which every other strategy has to equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipestill.model.blocks import BlockModel
from pipestill.model.boundary import copied, rows_of, to_device
from pipestill.model.dry_run import Contracts
from pipestill.model.seeding import seed_block
from pipestill.model.tasks import Task
from pipestill.runtime.batch import Batch, microbatch_rows
from pipestill.runtime.stage import run_blocks, weighted_loss
from pipestill.schedule import Role


def reference(
    task: Task,
    contracts: Contracts,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    microbatches: int,
    lr_factor: Callable[[int], float],
    seed: int,
    device: torch.device,
    before_update: Callable[[int, Batch, dict[str, float]], None],
    after_update: Callable[[int, Batch], None],
) -> None:
    """Train on all batches, accumulating the same microbatches in the same order as a pipeline; no schedule at all."""
    student, teacher = task.student_blocks, task.teacher_blocks
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    student.model.train()
    student.model.zero_grad(set_to_none=True)
    for step, batch in enumerate(batches):
        losses: dict[str, float] = {}
        for m, part in enumerate(microbatch_rows(batch.rows, microbatches)):
            if part.start == part.stop:
                continue
            inputs, target = (to_device(rows_of(v, part), device) for v in (batch.inputs, batch.targets))
            taught = None
            if teacher is not None:
                teacher.model.eval()
                with torch.no_grad():
                    taught = run_blocks(
                        teacher, range(len(teacher)), inputs, Role.TEACHER,
                        seed=seed, step=step, microbatch=m, device=device,
                    )  # fmt: skip
            if 0 in contracts.copies:
                inputs = copied(inputs)
            learnt = run_blocks(
                student, range(len(student)), inputs, Role.STUDENT, seed=seed, step=step, microbatch=m, device=device
            )
            seed_block(seed, Role.STUDENT, len(student), step, m, device)
            share = (part.stop - part.start) / batch.rows
            parts = task.loss_parts(learnt, taught, target)
            weighted_loss(parts, share).backward()
            for name, value in parts.items():
                losses[name] = losses.get(name, 0.0) + float(value.detach().double()) * share
        before_update(step, batch, losses)
        for group, base in zip(optimizer.param_groups, base_lrs, strict=True):
            group["lr"] = base * lr_factor(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after_update(step, batch)


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
    student.model.eval()
    with torch.no_grad():
        for step, batch in enumerate(batches):
            for m, part in enumerate(microbatch_rows(batch.rows, microbatches)):
                if part.start < part.stop:
                    inputs, target = (to_device(rows_of(v, part), device) for v in (batch.inputs, batch.targets))
                    output = run_blocks(
                        student, range(len(student)), inputs, Role.STUDENT,
                        seed=seed, step=step, microbatch=m, device=device,
                    )  # fmt: skip
                    add(output, target, part.stop - part.start)
    student.model.train()
