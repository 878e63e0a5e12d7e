"""Measures what it costs ranks to share the rows of a student block, for the search of a blockwise plan."""

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipestill.model.blockwise.task import Blockwise, BlockwiseContracts, teacher_output, untouched_blocks
from pipestill.model.measure import now
from pipestill.model.nests import copied, distinct_tensors, rows_of, to_device
from pipestill.optim import Schedules
from pipestill.runtime.blockwise.worker import BlockwiseWorker
from pipestill.runtime.pipeline.stage import move
from pipestill.runtime.world import Processes
from pipestill.schedule.blockwise.profile import BlockProfile

_FEW = 8  # rows of a batch that all ranks are told; the others repeat them
_TURNS = 5
_TURN_SECONDS = 0.01  # about so much work in a turn, in 2 to 8 steps


def group_sizes(num_ranks: int) -> list[int]:
    """The sizes of groups that are measured: 2, 3, 4, 6, 9 and on by a half, and all ranks. Between them lines are drawn."""
    sizes, size = list[int](), 2
    while size < num_ranks:
        sizes.append(size)
        size += max(1, size // 2)
    return [*sizes, num_ranks] if num_ranks > 1 else []


def measure_allreduces(
    task: Blockwise,
    contracts: BlockwiseContracts,
    inputs: Any,
    profile: BlockProfile,
    *,
    world: Processes,
    optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer],
    device: torch.device,
) -> BlockProfile:
    """Measure the all-reduces of every block in groups of several sizes, and return `profile` with them.

    All ranks call this together and get the same. `inputs` are those of a batch, on rank 0. Nothing in the models changes.

    Disjoint groups of one size, as many as there are ranks for, take student's steps on an equal share of a batch: turns of
    a few steps with all-reduces as in training, and turns without, one after the other. What a step takes longer with them
    is the median over turns, and over ranks. So it holds what training pays: messages, the waking of threads, copies, and
    waiting for the slowest, less what overlaps with the backward.
    """
    assert profile.batch is not None
    few = world.broadcast(None if inputs is None else rows_of(inputs, slice(0, _FEW)))
    worker = BlockwiseWorker(task, contracts, device=device, seed=0, optimizer=optimizer, schedules=Schedules())
    sizes, every = group_sizes(world.num_ranks), range(task.num_blocks)
    seconds: list[list[float]] = [[] for _ in every]
    worker.hold(every, every)
    for size in sizes:
        firsts = range(0, world.num_ranks - size + 1, size)
        groups = [dist.new_group(list(range(first, first + size))) for first in firsts]
        mine = world.rank // size
        rows = math.ceil(profile.batch / size)
        took: list[float] | None = None
        if mine < len(groups):
            index = torch.arange(rows) % distinct_tensors(few)[0].shape[0]
            steps = [
                min(8, max(2, math.ceil(_TURN_SECONDS / max(b.student(rows), 1e-6)))) if b.parameter_bytes else 0
                for b in profile.blocks
            ]
            with untouched_blocks(task):
                took = _of_blocks(worker, to_device(rows_of(few, index), device), groups[mine], size, steps)
        told = [extra for extra in world.broadcast(world.gather([took]) or None) if extra is not None]
        for block in every:
            seconds[block].append(median(of_rank[block] for of_rank in told))
        if mine < len(groups):
            dist.destroy_process_group(groups[mine])
    worker.release(every)
    move(task.teacher_blocks, every, torch.device("cpu"))
    return profile.with_allreduces(sizes, seconds)


def _of_blocks(worker: BlockwiseWorker, value: Any, group: Any, size: int, steps: Sequence[int]) -> list[float]:
    """Measure how much longer a step of each block takes with all-reduces; 0 for blocks of no steps."""
    extra = []
    for block, number in enumerate(steps):
        target = teacher_output(worker.task, block, copied(value))
        turns = list[float]()
        for turn in range(1 + _TURNS if number else 0):  # the first pays for connections and memory
            apart = _turn(worker, block, value, target, size, group, number, shared=False)
            together = _turn(worker, block, value, target, size, group, number, shared=True)
            if turn:
                turns.append(together - apart)
        extra.append(max(0.0, median(turns)) if turns else 0.0)
        value = target
    return extra


def _turn(
    worker: BlockwiseWorker, block: int, value: Any, target: Any, size: int, group: Any, steps: int, *, shared: bool
) -> float:
    """Seconds of a student's step (without its update), on average over `steps`."""
    dist.barrier(group)
    start = now()
    for number in range(steps):
        worker.train(block, value, target, 1 / size, number, dist.get_rank(group), group if shared else None)
        if shared:
            worker.reduce(block)
        for parameter in worker.blocks[block].parameters.values():
            parameter.grad = None
    return (now() - start) / steps
