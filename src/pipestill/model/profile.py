"""Measures what every block of a pipeline's models costs on this machine.

What the pieces of a training step take becomes `Costs` in the same way, be it measured here or computed for another device.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipestill.costs import BlockCosts, Costs, Link
from pipestill.model.blocks import BlockModel
from pipestill.model.boundary import SplitBlock, Unsplittable, detached, start_of
from pipestill.model.measure import Seconds, Stopwatch, state_bytes, trial_optimizer
from pipestill.model.nests import copied, distinct_tensors, memory_of, num_bytes, rows_of
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.stepwise import stepwise, untouched
from pipestill.model.tasks import Task
from pipestill.optim import OptimizerFactory


class Update(NamedTuple):
    """What the update of one student block takes."""

    seconds: float
    training_bytes: int
    """Bytes of the gradients of the block's weights, and of its optimizer's state."""


def microbatch_of(inputs: Any, targets: Any, rows: int) -> tuple[Any, Any]:
    """Take `rows` rows of a sample batch's inputs and targets, from the beginning again where it has fewer."""
    index = torch.arange(rows) % distinct_tensors(inputs)[0].shape[0]
    return rows_of(inputs, index), rows_of(targets, index)


def costs_of(
    task: Task,
    seconds: Seconds,
    *,
    rows: int,
    updates: Sequence[Update],
    weight_fractions: Sequence[float],
    stash: StashCounter,
    student_bytes: Sequence[Sequence[int]],
    teacher_bytes: Sequence[Sequence[int]],
) -> Costs:
    """Assemble the costs of a microbatch of `rows` rows.

    `seconds` holds the pieces of a step, once a view. `updates` and `weight_fractions` go by student block; the latter is
    the fraction of its backward that the gradients of its weights take. `student_bytes` and `teacher_bytes` are those of the
    value after each block, by view.
    """
    student = tuple(
        BlockCosts(
            name=block.name,
            forward_seconds=mean(seconds["student", i]),
            backward_seconds=mean(seconds["backward", i]),
            update_seconds=updates[i].seconds,
            parameter_bytes=parameter_bytes(task.student_blocks, i),
            output_bytes=round(mean(view[i] for view in student_bytes)),
            stash_bytes=round(mean(stash.num_bytes[i])),
            weight_seconds=mean(seconds["backward", i]) * weight_fractions[i],
            training_bytes=updates[i].training_bytes,
            feature_seconds=mean(seconds.get(("feature", i), [0.0])),
        )
        for i, block in enumerate(task.student_blocks.blocks)
    )
    views = task.demands.views
    by_view = [sum(seconds[what, i][v] for what in ("student", "backward") for i in range(len(student))) for v in range(views)]
    teacher: tuple[BlockCosts, ...] = ()
    if task.teacher_blocks is not None:
        # relative to each other, views cost the same in both models, and the teacher may see the first of them only
        seen = by_view[: task.demands.teacher_views]
        of_mean_view = mean(by_view) / mean(seen) if any(by_view) else 1.0
        teacher = tuple(
            BlockCosts(
                name=block.name,
                forward_seconds=mean(seconds["teacher", i]) * of_mean_view,
                parameter_bytes=parameter_bytes(task.teacher_blocks, i),
                output_bytes=round(mean(view[i] for view in teacher_bytes) * of_mean_view),
            )
            for i, block in enumerate(task.teacher_blocks.blocks)
        )
    scales = tuple(one / mean(by_view) for one in by_view) if views > 1 and any(by_view) else (1.0,) * views
    return Costs(student, teacher, loss_seconds=mean(seconds["loss", 0]), rows=rows, views=scales)


def parameter_bytes(model: BlockModel, block: int) -> int:
    """The bytes of one block's weights."""
    return num_bytes(list(model.parameters_of(range(block, block + 1)).values()))


# -- what blocks stash ------------------------------------------------------------------------------------------------


class StashCounter:
    """Counts the bytes that each student block keeps from its forward to its backward.

    A piece of memory counts for the first block that keeps it. Weights and buffers do not count.
    """

    def __init__(self, task: Task) -> None:
        self.num_bytes: list[list[int]] = [[] for _ in task.student_blocks.blocks]
        """By block: the bytes in each view."""
        self.fresh = 0
        """The bytes of the block that is running, so far."""
        model = task.student_blocks.model
        kept = [*model.parameters(), *model.buffers()]
        self.seen = {memory_of(tensor): tensor for tensor in kept}  # tensors are held, so that no memory is used again

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd keeps for the block that is running."""
        memory = memory_of(tensor)
        if memory not in self.seen:
            self.seen[memory] = tensor
            self.fresh += tensor.untyped_storage().nbytes()
        return tensor

    def mark(self, what: str, block: int) -> None:
        """Note the bytes of a piece of a step, which ends here."""
        if what == "student":
            self.num_bytes[block].append(self.fresh)
        self.fresh = 0


@contextmanager
def counted_stashes(task: Task) -> Iterator[StashCounter]:
    """Count, in the body, what autograd keeps of the student's blocks."""
    counter = StashCounter(task)
    with torch.autograd.graph.saved_tensors_hooks(counter.keep, lambda tensor: tensor):
        yield counter


# -- backwards in two halves ------------------------------------------------------------------------------------------


def weight_fractions(
    model: BlockModel,
    outputs: Sequence[Any],
    measured: Callable[[], AbstractContextManager[Stopwatch]],
    *,
    repeats: int = 1,
    whole: Container[int] = (),
) -> list[float]:
    """The fraction of each block's backward, taken in two halves, that the second half takes: the gradients of weights.

    It is 1 for the first block, whose input has no gradient, and 0 where a backward stays whole, as those of the blocks in
    `whole` do. `outputs` holds the value after each block. Seconds are medians over `repeats` tries; `measured()` is the
    context in which a stopwatch measures one.
    """
    fractions = [1.0]
    for i in range(1, len(model)):
        tries = range(0 if i in whole else repeats)
        try:
            halves = [_halves(model.blocks[i].call, outputs[i - 1], measured) for _ in tries]
        except Unsplittable:
            halves = []
        first, second = (median(seconds) for seconds in zip(*halves, strict=True)) if halves else (1.0, 0.0)
        fractions.append(second / (first + second) if first + second else 0.0)
    return fractions


def _halves(
    call: Callable[[Any], Any], value: Any, measured: Callable[[], AbstractContextManager[Stopwatch]]
) -> tuple[float, float]:
    """The seconds of each half of one block's backward, from gradients of 1."""
    entered = detached(copied(value)).value
    block = SplitBlock(start_of(entered))  # asked before the call, which may write to the value in place
    output = call(entered)
    roots = [(tensor, torch.ones_like(tensor)) for tensor in distinct_tensors(output) if tensor.requires_grad]
    with measured() as watch:
        block.input_half(roots)
        watch.mark("input", 0)
        block.weight_half()
        watch.mark("weight", 0)
    return watch.seconds["input", 0][0], watch.seconds["weight", 0][0]


def profile(
    task: Task,
    contracts: PipelineContracts,
    inputs: Any,
    targets: Any,
    *,
    rows: int,
    optimizer: OptimizerFactory,
    repeats: int = 5,
    link: Link | None = None,
    interference: float = 1.0,
    split: bool = False,
) -> Costs:
    """Measure the costs of a microbatch of `rows` real rows: the sample's, from the beginning again where it has fewer.

    Seconds of each block's forward, backward and update are medians over `repeats` steps, and the mean of the views; what
    each view takes, relative to that mean, is kept too. `split`: also measure which fraction of each backward the gradients
    of the weights take; else it is said to be half. Nothing in the models changes. A first step, which is not timed, counts
    what the blocks stash.
    """
    inputs, targets = microbatch_of(inputs, targets, rows)
    blocks = task.student_blocks
    rounds = []
    fractions = [0.5] * len(blocks)
    with untouched(task):
        with counted_stashes(task) as stash:
            stepwise(task, inputs, targets, stash.mark)
        for _ in range(repeats):
            watch = Stopwatch()
            stepwise(task, inputs, targets, watch.mark)
            rounds.append(watch.seconds)
        if split:
            outputs = stepwise(task, inputs, targets).student[0]
            fractions = weight_fractions(blocks, outputs, lambda: nullcontext(Stopwatch()), repeats=3, whole=contracts.unsplit)
        updates = [_update(blocks, i, optimizer) for i in range(len(blocks))]
    costs = costs_of(
        task,
        {key: [median(values) for values in zip(*(r[key] for r in rounds), strict=True)] for key in rounds[0]},
        rows=rows,
        updates=updates,
        weight_fractions=fractions,
        stash=stash,
        student_bytes=[[contract.num_bytes(rows) for contract in view] for view in contracts.student],
        teacher_bytes=[[contract.num_bytes(rows) for contract in view] for view in contracts.teacher],
    )
    return dataclasses.replace(costs, link=link or Link(), interference=interference, source="measured")


def _update(model: BlockModel, block: int, make: OptimizerFactory) -> Update:
    """Measure an optimizer's step on copies of one block's parameters, once it has its state."""
    trained = {n: p for n, p in model.parameters_of(range(block, block + 1)).items() if p.requires_grad}
    optimizer = trial_optimizer(trained, make)
    if optimizer is None:
        return Update(0.0, 0)
    optimizer.step()
    watch = Stopwatch()
    for _ in range(3):
        optimizer.step()
        watch.mark("update", 0)
    return Update(median(watch.seconds["update", 0]), num_bytes(list(trained.values())) + state_bytes(optimizer))


def wake_seconds(
    task: Task, inputs: Any, targets: Any, *, rows: int, num_stages: int, nap_seconds: float, repeats: int = 10
) -> float:
    """Measure how much longer a stage's work on a microbatch takes after its core has slept for `nap_seconds`.

    Meanwhile others use the core's caches, and its clock slows down. Returns the median over `repeats` microbatches, in
    seconds a nap.
    """
    inputs, targets = microbatch_of(inputs, targets, rows)
    blocks_a_stage = math.ceil(len(task.student_blocks) / num_stages)

    def pieces(naps: int) -> list[float]:
        """The seconds of a step's pieces, with a nap after each of the first `naps` stages; naps count for no piece."""
        watch, ended = Stopwatch(), count(1)

        def mark(what: str, block: int) -> None:
            watch.mark(what, block)
            number = next(ended)
            if number % blocks_a_stage == 0 and number <= naps * blocks_a_stage:
                time.sleep(nap_seconds)
                watch.last = watch.clock()

        stepwise(task, inputs, targets, mark)
        return [seconds for each in watch.seconds.values() for seconds in each]

    with untouched(task):
        naps = (len(pieces(0)) - 1) // blocks_a_stage  # none after the last piece: the next step would start cold
        longer = [sum(pieces(naps)) - sum(pieces(0)) for _ in range(repeats)]
    return max(0.0, median(longer) / max(1, naps))
