"""Measures what every block costs on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

from pipestill.costs import BlockCosts, Costs, Link
from pipestill.model.blocks import BlockModel
from pipestill.model.boundary import distinct_tensors, rows_of
from pipestill.model.dry_run import Contracts
from pipestill.model.stepwise import stepwise, untouched
from pipestill.model.tasks import Task


def profile(
    task: Task,
    contracts: Contracts,
    inputs: Any,
    targets: Any,
    *,
    rows: int,
    optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer],
    repeats: int = 5,
    link: Link | None = None,
    interference: float = 1.0,
) -> Costs:
    """Median seconds of every block's forward, backward and update on `rows` real rows (the sample's, repeated).

    Nothing in the models changes. The first of `repeats` + 1 rounds is not counted.
    """
    index = torch.arange(rows) % distinct_tensors(inputs)[0].shape[0]
    inputs, targets = rows_of(inputs, index), rows_of(targets, index)
    rounds = []
    with untouched(task):
        for _ in range(repeats + 1):
            watch = _Stopwatch()
            stepwise(task, inputs, targets, watch.mark)
            rounds.append(watch.seconds)
        updates = [_update_seconds(task.student_blocks, i, optimizer) for i in range(len(task.student_blocks))]
    seconds = {key: median(r[key] for r in rounds[1:]) for key in rounds[0]}
    student = tuple(
        BlockCosts(
            name=block.name,
            forward_seconds=seconds["student", i],
            backward_seconds=seconds["backward", i],
            update_seconds=updates[i],
            parameter_bytes=_parameter_bytes(task.student_blocks, i),
            output_bytes=contracts.student[i].num_bytes(rows),
        )
        for i, block in enumerate(task.student_blocks.blocks)
    )
    teacher: tuple[BlockCosts, ...] = ()
    if task.teacher_blocks is not None:
        teacher = tuple(
            BlockCosts(
                name=block.name,
                forward_seconds=seconds["teacher", i],
                parameter_bytes=_parameter_bytes(task.teacher_blocks, i),
                output_bytes=contracts.teacher[i].num_bytes(rows),
            )
            for i, block in enumerate(task.teacher_blocks.blocks)
        )
    return Costs(
        student, teacher, loss_seconds=seconds["loss", 0], rows=rows, link=link or Link(), interference=interference
    )


def _parameter_bytes(model: BlockModel, block: int) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters_of(range(block, block + 1)).values())


class _Stopwatch:
    """Seconds between marks, of finished work."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, int], float] = {}
        self.last = self._now()

    def mark(self, name: str, index: int) -> None:
        now = self._now()
        self.seconds[name, index] = now - self.last
        self.last = self._now()

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def _update_seconds(
    model: BlockModel, block: int, optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]
) -> float:
    """Seconds of an optimizer step on copies of a block's parameters, its state already there."""
    copies = {
        name: nn.Parameter(p.detach().clone())
        for name, p in model.parameters_of(range(block, block + 1)).items()
        if p.requires_grad
    }
    if not copies:
        return 0.0
    for copy in copies.values():
        copy.grad = torch.zeros_like(copy)
    stepper = optimizer(copies)
    stepper.step()
    watch = _Stopwatch()
    stepper.step()
    watch.mark("update", 0)
    return watch.seconds["update", 0]
