"""The work on one block in blockwise training: the teacher's forward; the student's forward, loss and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from pipestill.model.blockwise.task import Blockwise
from pipestill.model.seeding import seed_block
from pipestill.model.stepwise import restored
from pipestill.schedule import Role


def teacher_output(task: Blockwise, block: int, value: Any) -> Any:
    """Run one teacher block, without a graph."""
    with torch.no_grad():
        return task.teacher_blocks.blocks[block].call(value)


current_batch: ContextVar[int] = ContextVar("batch")
"""The number of the batch that a student block is being trained on."""


def batch_number() -> int:
    """The number of the batch, counted from 0 over the whole run, that the running student block is trained on.

    A block of a `ps.Blockwise` task calls this where what it does changes with the batch, as a supernet's random paths do.

    Raises:
        LookupError: no student block is being trained.
    """
    return current_batch.get()


def train_block(
    task: Blockwise, block: int, value: Any, target: Any, weight: float, *, seed: int, batch: int, unit: int, device: torch.device
) -> Tensor:
    """Run forward, loss and backward of one student block and of its candidates, on some rows of a batch.

    `weight` is the fraction of the batch's rows that these are: weighted so, losses and gradients of all parts of a batch
    add up to those of its mean loss. Returns the weighted sum of the variants' losses, detached. Random numbers follow from
    (seed, batch, block, unit), so they are the same on any schedule.
    """
    total: Tensor | None = None
    current_batch.set(batch)
    with torch.enable_grad():
        for number, variant in enumerate(task.variants(block)):
            seed_block(seed, Role.STUDENT, block, batch, unit * len(task.variants(block)) + number, device)
            loss = task.loss_of(block)(variant(value), target)
            part = loss * weight
            if part.requires_grad:  # a block may have nothing to train
                part.backward()
            total = part.detach() if total is None else total + part.detach()
    assert total is not None
    return total


@contextmanager
def untouched_blocks(task: Blockwise) -> Iterator[None]:
    """Run the body with the task's modules in their training modes, and leave no trace in them or in the random state."""
    modules = [task.teacher, task.student]
    modules += [module for block in range(task.num_blocks) for module in task.modules_of(block).values()]
    with restored(modules):
        task.in_mode(train=True)
        yield
