"""Measures what every block of a pipeline's models costs on this machine."""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import nullcontext
from itertools import count
from statistics import median
from typing import Any

from pipestill.costs import Costs, Link
from pipestill.model.blocks import BlockModel
from pipestill.model.measure import Stopwatch, state_bytes, trial_optimizer
from pipestill.model.nests import num_bytes
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.step_costs import Update, costs_of, counted_stashes, microbatch_of, weight_fractions
from pipestill.model.stepwise import stepwise, untouched
from pipestill.model.tasks import Task
from pipestill.optim import OptimizerFactory


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
            fractions = weight_fractions(
                blocks, outputs, lambda: nullcontext(Stopwatch()), repeats=3, whole=contracts.unsplit
            )
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
