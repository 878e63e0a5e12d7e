"""Measures what every block costs on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from pipestill.costs import BlockCosts, Costs, Link
from pipestill.model.blocks import BlockModel
from pipestill.model.boundary import copied, cut, distinct_tensors, rows_of
from pipestill.model.dry_run import Contracts
from pipestill.model.split import SplitBlock, start_of
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
    split: bool = False,
) -> Costs:
    """Median seconds of every block's forward, backward and update on `rows` real rows (the sample's, repeated), in the
    mean of the views, and what each view takes of that.

    `split`: find out which part of each backward the gradients of the weights take; else they are said to take half.
    Nothing in the models changes. The first of `repeats` + 1 rounds is not counted.
    """
    index = torch.arange(rows) % distinct_tensors(inputs)[0].shape[0]
    inputs, targets = rows_of(inputs, index), rows_of(targets, index)
    rounds = []
    shares = [0.5] * len(task.student_blocks)
    with untouched(task):
        for _ in range(repeats + 1):
            watch = _Stopwatch()
            stepwise(task, inputs, targets, watch.mark)
            rounds.append(watch.seconds)
        if split:
            shares = _weight_shares(task.student_blocks, stepwise(task, inputs, targets).student[0], contracts)
        updates = [_update_seconds(task.student_blocks, i, optimizer) for i in range(len(task.student_blocks))]
    seconds = {key: [median(values) for values in zip(*(r[key] for r in rounds[1:]), strict=True)] for key in rounds[0]}
    views = task.demands.views
    student = tuple(
        BlockCosts(
            name=block.name,
            forward_seconds=mean(seconds["student", i]),
            backward_seconds=mean(seconds["backward", i]),
            update_seconds=updates[i],
            parameter_bytes=_parameter_bytes(task.student_blocks, i),
            output_bytes=round(mean(contract[i].num_bytes(rows) for contract in contracts.student)),
            weight_seconds=mean(seconds["backward", i]) * shares[i],
        )
        for i, block in enumerate(task.student_blocks.blocks)
    )
    of_views = [
        sum(seconds[what, i][v] for what in ("student", "backward") for i in range(len(student))) for v in range(views)
    ]
    teacher: tuple[BlockCosts, ...] = ()
    if task.teacher_blocks is not None:
        seen = of_views[: task.demands.teacher_views]
        smaller = (
            mean(of_views) / mean(seen) if sum(of_views) else 1.0
        )  # views cost the same in both models, relatively
        teacher = tuple(
            BlockCosts(
                name=block.name,
                forward_seconds=mean(seconds["teacher", i]) * smaller,
                parameter_bytes=_parameter_bytes(task.teacher_blocks, i),
                output_bytes=round(mean(contract[i].num_bytes(rows) for contract in contracts.teacher) * smaller),
            )
            for i, block in enumerate(task.teacher_blocks.blocks)
        )
    scales = tuple(one / mean(of_views) for one in of_views) if views > 1 and sum(of_views) else (1.0,) * views
    return Costs(
        student, teacher, loss_seconds=mean(seconds["loss", 0]), rows=rows, link=link or Link(),
        interference=interference, views=scales,
    )  # fmt: skip


def _weight_shares(model: BlockModel, outputs: list[Any], contracts: Contracts) -> list[float]:
    """Of each block's backward in two halves, the second's share: all of the first block's, nothing where it stays whole."""
    shares = [1.0]
    for i in range(1, len(model)):
        halves: list[tuple[float, float]] = []
        for _ in range(0 if i in contracts.unsplit else 3):
            entered, _, _ = cut(copied(outputs[i - 1]))
            start = start_of([tensor for tensor in distinct_tensors(entered) if tensor.requires_grad])
            value = model.blocks[i].call(entered)
            roots = [(tensor, torch.ones_like(tensor)) for tensor in distinct_tensors(value) if tensor.requires_grad]
            block, watch = SplitBlock(start), _Stopwatch()
            block.input_half(roots)
            watch.mark("input", 0)
            block.weight_half()
            watch.mark("weight", 0)
            halves.append((watch.seconds["input", 0][0], watch.seconds["weight", 0][0]))
        first, second = (median(times) for times in zip(*halves, strict=True)) if halves else (1.0, 0.0)
        shares.append(second / (first + second) if first + second else 0.0)
    return shares


def _parameter_bytes(model: BlockModel, block: int) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters_of(range(block, block + 1)).values())


class _Stopwatch:
    """Seconds between marks, of finished work."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, int], list[float]] = {}  # of each piece, in every view
        self.last = self._now()

    def mark(self, name: str, index: int) -> None:
        now = self._now()
        self.seconds.setdefault((name, index), []).append(now - self.last)
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
    for _ in range(3):
        stepper.step()
        watch.mark("update", 0)
    return median(watch.seconds["update", 0])
