"""The blockwise reference: a plain loop on one device that trains one block after the other, each over all of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from pipestill.model.blockwise.task import Blockwise, BlockwiseContracts
from pipestill.model.nests import to_device
from pipestill.runtime.batch import Batch
from pipestill.runtime.blockwise.worker import BlockwiseWorker
from pipestill.runtime.pipeline.stage import move
from pipestill.runtime.reports import LogClock, RunListener, check_finite_blocks, logged_blocks
from pipestill.runtime.settings import TrainingSettings


@dataclass(frozen=True)
class BlocksTrained:
    """What a blockwise reference has done: each block's mean loss over its last logged batches, and what it read."""

    losses: list[float]
    batches: int
    samples: int


def blockwise_reference(
    task: Blockwise,
    contracts: BlockwiseContracts,
    read: Callable[[], Iterator[Batch]],
    *,
    settings: TrainingSettings,
    device: torch.device,
    listener: RunListener,
) -> BlocksTrained:
    """Train every block of `task` to its end before the next; no schedule at all. `read` opens the data anew."""
    worker = BlockwiseWorker(
        task, contracts, device=device, seed=settings.seed, optimizer=settings.optimizer, schedules=settings.schedules
    )
    worker.hold(range(task.num_blocks), ())
    losses, batches, samples = [math.nan] * task.num_blocks, 0, 0
    for block in range(task.num_blocks):
        worker.hold((), [block])
        batches = samples = 0
        clock = LogClock()
        for number, batch in enumerate(read()):
            value = to_device(batch.inputs, device)
            for before in range(block):
                value = worker.teacher_output(before, value)
            worker.train(block, value, worker.teacher_output(block, value), 1.0, number, 0, None)
            worker.update(block, number)
            batches, samples = batches + 1, samples + batch.rows
            clock.count(batch.rows)
            if batches % settings.log_every == 0 or batch.last:
                lap = clock.lap()
                losses[block] = float(worker.loss_sums[block]) / lap.steps
                worker.loss_sums.zero_()
                check_finite_blocks({block: losses[block]}, number)
                lr = settings.schedules.lr_at(number)
                listener.step(
                    logged_blocks(number, batch.epoch, {block: losses[block]}, lr=lr, **lap.values(bubble=0.0))
                )
        worker.release([block])
    move(task.teacher_blocks, range(task.num_blocks), torch.device("cpu"))
    return BlocksTrained(losses, batches, samples)
