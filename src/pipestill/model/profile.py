"""Measures what every block costs on this machine."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.costs import BlockCosts, Costs, Link
from pipestill.model.blocks import BlockModel
from pipestill.model.boundary import detached, start_of
from pipestill.model.nests import copied, distinct_tensors, rows_of
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.split import SplitBlock
from pipestill.model.stepwise import stepwise, untouched
from pipestill.model.tasks import Task


def profile(
    task: Task,
    contracts: PipelineContracts,
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
    Nothing in the models changes. A first round, in which nothing is timed, finds out what the blocks stash.
    """
    inputs, targets = microbatch_of(inputs, targets, rows)
    rounds = []
    shares = [0.5] * len(task.student_blocks)
    with untouched(task):
        with counted_stashes(task) as stash:
            stepwise(task, inputs, targets, stash.mark)
        for _ in range(repeats):
            watch = _Stopwatch()
            stepwise(task, inputs, targets, watch.mark)
            rounds.append(watch.seconds)
        if split:
            shares = _weight_shares(task.student_blocks, stepwise(task, inputs, targets).student[0], contracts)
        updates = [_update(task.student_blocks, i, optimizer) for i in range(len(task.student_blocks))]
    seconds = {key: [median(values) for values in zip(*(r[key] for r in rounds), strict=True)] for key in rounds[0]}
    costs = assemble(
        task, seconds, rows=rows, updates=updates, shares=shares, stash=stash,
        student_bytes=[[contract.num_bytes(rows) for contract in view] for view in contracts.student],
        teacher_bytes=[[contract.num_bytes(rows) for contract in view] for view in contracts.teacher],
    )  # fmt: skip
    return dataclasses.replace(costs, link=link or Link(), interference=interference, source="measured")


def wake_seconds(
    task: Task, inputs: Any, targets: Any, *, rows: int, num_stages: int, nap_seconds: float, repeats: int = 10
) -> float:
    """How much longer a stage's work on a microbatch takes where its core slept for `nap_seconds` before: meanwhile others use
    its caches, and its clock slows down. The median of a microbatch's difference, for each nap.
    """
    inputs, targets = microbatch_of(inputs, targets, rows)
    blocks_a_stage = math.ceil(len(task.student_blocks) / num_stages)

    def pieces(nap_seconds: float, most: int) -> list[float]:
        watch = _Naps(blocks_a_stage, nap_seconds, most)
        stepwise(task, inputs, targets, watch.mark)
        return [seconds for each in watch.seconds.values() for seconds in each]

    with untouched(task):
        naps = (
            len(pieces(0.0, 0)) - 1
        ) // blocks_a_stage  # none after the last piece, for the next round to start with
        longer = [sum(pieces(nap_seconds, naps)) - sum(pieces(0.0, 0)) for _ in range(repeats)]
    return max(0.0, median(longer) / max(1, naps))


Seconds = dict[tuple[str, int], list[float]]
"""Of each piece of a step ("teacher", "student", "loss" or "backward", and its block), in every view."""


def microbatch_of(inputs: Any, targets: Any, rows: int) -> tuple[Any, Any]:
    """`rows` rows of a sample batch, from its beginning again where it has fewer."""
    index = torch.arange(rows) % distinct_tensors(inputs)[0].shape[0]
    return rows_of(inputs, index), rows_of(targets, index)


def assemble(
    task: Task,
    seconds: Seconds,
    *,
    rows: int,
    updates: Sequence[tuple[float, int]],
    shares: Sequence[float],
    stash: StashCounter,
    student_bytes: Sequence[Sequence[int]],
    teacher_bytes: Sequence[Sequence[int]],
) -> Costs:
    """Costs from what a step's pieces take. `updates`: seconds and `training_bytes` of each student block. `shares`: of its
    backward, that of the weights. Bytes: after each block in each view.
    """
    views = task.demands.views
    student = tuple(
        BlockCosts(
            name=block.name,
            forward_seconds=mean(seconds["student", i]),
            backward_seconds=mean(seconds["backward", i]),
            update_seconds=updates[i][0],
            parameter_bytes=parameter_bytes(task.student_blocks, i),
            output_bytes=round(mean(view[i] for view in student_bytes)),
            stash_bytes=round(mean(stash.num_bytes[i])),
            weight_seconds=mean(seconds["backward", i]) * shares[i],
            training_bytes=updates[i][1],
        )
        for i, block in enumerate(task.student_blocks.blocks)
    )
    of_views = [
        sum(seconds[what, i][v] for what in ("student", "backward") for i in range(len(student))) for v in range(views)
    ]
    teacher: tuple[BlockCosts, ...] = ()
    if task.teacher_blocks is not None:
        seen = of_views[: task.demands.teacher_views]
        # views cost the same in both models, relatively
        smaller = mean(of_views) / mean(seen) if any(of_views) else 1.0
        teacher = tuple(
            BlockCosts(
                name=block.name,
                forward_seconds=mean(seconds["teacher", i]) * smaller,
                parameter_bytes=parameter_bytes(task.teacher_blocks, i),
                output_bytes=round(mean(view[i] for view in teacher_bytes) * smaller),
            )
            for i, block in enumerate(task.teacher_blocks.blocks)
        )
    scales = tuple(one / mean(of_views) for one in of_views) if views > 1 and any(of_views) else (1.0,) * views
    return Costs(student, teacher, loss_seconds=mean(seconds["loss", 0]), rows=rows, views=scales)


class StashCounter:
    """Bytes that each student block keeps from its forward to its backward, one number a view.

    A piece of memory counts for the first block that keeps it, and weights and buffers do not count.
    """

    def __init__(self, task: Task) -> None:
        self.num_bytes: list[list[int]] = [[] for _ in task.student_blocks.blocks]
        self.fresh = 0
        blocks = task.student_blocks
        kept = [*blocks.model.parameters(), *blocks.model.buffers()]
        self.seen = {_memory(tensor): tensor for tensor in kept}  # held on to, so that no address comes twice

    def keep(self, tensor: Tensor) -> Tensor:
        """Count what autograd keeps of the block that is running."""
        memory = _memory(tensor)
        if memory not in self.seen:
            self.seen[memory] = tensor
            self.fresh += tensor.untyped_storage().nbytes()
        return tensor

    def mark(self, what: str, block: int) -> None:
        """Hear that a piece of a step is done."""
        if what == "student":
            self.num_bytes[block].append(self.fresh)
        self.fresh = 0


def _memory(tensor: Tensor) -> int:
    """What tells a piece of memory from others, on a device without any (meta) too."""
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def counted_stashes(task: Task) -> Iterator[StashCounter]:
    """Hears what autograd keeps of the student, block after block."""
    found = StashCounter(task)
    with torch.autograd.graph.saved_tensors_hooks(found.keep, lambda tensor: tensor):
        yield found


def _weight_shares(model: BlockModel, outputs: list[Any], contracts: PipelineContracts) -> list[float]:
    """Of each block's backward in two halves, the second's share: all of the first block's, nothing where it stays whole."""
    shares = [1.0]
    for i in range(1, len(model)):
        halves: list[tuple[float, float]] = []
        for _ in range(0 if i in contracts.unsplit else 3):
            entered, _, _ = detached(copied(outputs[i - 1]))
            start = start_of(entered)
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


def parameter_bytes(model: BlockModel, block: int) -> int:
    """Bytes of a block's weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters_of(range(block, block + 1)).values())


class _Stopwatch:
    """Seconds between marks, of finished work."""

    def __init__(self) -> None:
        self.seconds: Seconds = {}
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


class _Naps(_Stopwatch):
    """Sleeps after every so many pieces of a step, `most` times, and times the pieces alone."""

    def __init__(self, every: int, nap_seconds: float, most: int) -> None:
        super().__init__()
        self.every, self.nap_seconds, self.left, self.count = every, nap_seconds, most, 0

    def mark(self, name: str, index: int) -> None:
        super().mark(name, index)
        self.count += 1
        if self.left and self.count % self.every == 0:
            self.left -= 1
            time.sleep(self.nap_seconds)
            self.last = self._now()


def _update(
    model: BlockModel, block: int, optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]
) -> tuple[float, int]:
    """Seconds of an optimizer step on copies of a block's parameters, its state already there; bytes of their gradients and of
    that state.
    """
    copies = {
        name: nn.Parameter(p.detach().clone())
        for name, p in model.parameters_of(range(block, block + 1)).items()
        if p.requires_grad
    }
    if not copies:
        return 0.0, 0
    for copy in copies.values():
        copy.grad = torch.zeros_like(copy)
    stepper = optimizer(copies)
    stepper.step()
    watch = _Stopwatch()
    for _ in range(3):
        stepper.step()
        watch.mark("update", 0)
    state = [value for values in stepper.state.values() for value in values.values() if isinstance(value, Tensor)]
    return median(watch.seconds["update", 0]), sum(t.numel() * t.element_size() for t in (*copies.values(), *state))
