"""One block's work in blockwise training: the teacher's forward, and a student block's forward, loss and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from pipestill.model.blockwise.task import Blockwise
from pipestill.model.restore import restored
from pipestill.model.seeding import seed_block
from pipestill.schedule import Role


def teacher_output(task: Blockwise, block: int, value: Any) -> Any:
    """What a teacher block gives, without a graph."""
    with torch.no_grad():
        return task.teacher_blocks.blocks[block].call(value)


current_batch: ContextVar[int] = ContextVar("batch")


def batch_number() -> int:
    """Which batch of the run, from 0, a student block is being trained on; for blocks that change with it.

    Raises `LookupError` outside of blockwise training.
    """
    return current_batch.get()


def train_block(
    task: Blockwise, block: int, value: Any, target: Any, share: float, *, seed: int, batch: int, unit: int,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Forward, loss and backward of a student block and its candidates, for `share` of a batch's rows.

    Gradients of the batch's mean loss add up over shares. Returns that part of the sum of the variants' losses, detached.
    Random numbers follow from (seed, batch, block, unit), so that they are the same on any schedule.
    """
    total: Tensor | None = None
    current_batch.set(batch)
    with torch.enable_grad():
        for number, variant in enumerate(task.variants(block)):
            seed_block(seed, Role.STUDENT, block, batch, unit * len(task.variants(block)) + number, device)
            loss = task.loss_of(block)(variant(value), target)
            part = loss * share
            if part.requires_grad:  # a block may have nothing to train
                part.backward()
            total = part.detach() if total is None else total + part.detach()
    assert total is not None
    return total


@contextmanager
def untouched_blocks(task: Blockwise) -> Iterator[None]:
    """The modes of training; buffers, gradients, modes and the random state put back afterwards."""
    modules = [task.teacher, task.student]
    modules += [module for block in range(task.num_blocks) for module in task.modules_of(block).values()]
    with restored(modules):
        task.in_mode(train=True)
        yield
