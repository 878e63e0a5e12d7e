"""Measures what teacher blocks and student blocks take at every share of a batch, for the search of a blockwise plan."""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import count
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from pipestill.costs import Link
from pipestill.model.blockwise.task import Blockwise, BlockwiseContracts, teacher_output, train_block, untouched_blocks
from pipestill.model.measure import LiveBytes, now, state_bytes, trial_optimizer
from pipestill.model.nests import copied, distinct_tensors, num_bytes, rows_of, to_device
from pipestill.optim import OptimizerFactory
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes

_FEWEST_SAMPLES = 5
_MOST_SAMPLES = 40
_SMALL_ERROR = 0.03
"""Samples are taken until the standard error of their mean, relative to it, is below this: 95 % of means are then within 6 %
of the true one."""
_KEPT_SAMPLES = 0.9
"""The fraction of the samples, the fastest ones, that counts: the slowest tenth is the machine's."""
_BATCHES_OF_MEMORY = 8
"""Batches whose memory is counted, for blocks that do other work for each."""


def measure_blocks(
    task: Blockwise,
    contracts: BlockwiseContracts,
    inputs: Any,
    *,
    batch: int,
    devices: int,
    optimizer: OptimizerFactory,
    link: Link | None = None,
    device: torch.device | None = None,
) -> BlockProfile:
    """Measure the seconds of every teacher block's forward and student block's step at each share of a batch.

    A step is forward, backward and update. Shares are the rows of a batch of `batch` rows that each of 1 to `devices` ranks
    takes. Each point is sampled on real activations, those of `inputs` repeated to as many rows, until the standard error
    of its mean is below 3 %, at least 5 and at most 40 times; the largest remaining error goes into the profile. Memory is
    that of parameters, gradients and the optimizer's state after a step, and what a student block's step holds at its peak.
    Nothing in the models changes.
    """
    device = device or torch.device("cpu")
    every = range(task.num_blocks)
    tensors = [
        *task.teacher_blocks.tensors_of(every).values(),
        *(tensor for block in every for tensor in task.tensors_of(block).values()),
    ]
    homes = [tensor.device for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(device)
    shares = sorted({math.ceil(batch / ranks) for ranks in range(1, devices + 1)})
    index = torch.arange(shares[-1]) % distinct_tensors(inputs)[0].shape[0]
    blocks = []
    with untouched_blocks(task):
        value = to_device(rows_of(inputs, index), device)
        for block in every:
            target = teacher_output(task, block, copied(value))
            blocks.append(_measure(task, contracts, block, value, target, shares, optimizer, device))
            value = target
    for tensor, home in zip(tensors, homes, strict=True):
        tensor.data = tensor.data.to(home)
    return BlockProfile(tuple(blocks), link or Link(), batch)


def _measure(
    task: Blockwise, contracts: BlockwiseContracts, block: int, value: Any, target: Any, shares: Sequence[int],
    make: OptimizerFactory, device: torch.device,
) -> BlockTimes:  # fmt: skip
    """Measure one block. `value` and `target`: its input and the teacher's output, of as many rows as the largest share."""
    parameters = task.parameters_of(block)
    optimizer = trial_optimizer(parameters, make)
    batches = count()  # a block may do other work for each (a supernet's random paths): the mean is wanted

    def train(given: Any, wanted: Any, batch: int) -> None:
        given = copied(given) if block in contracts.student_writes else given
        train_block(task, block, given, wanted, 1.0, seed=0, batch=batch, unit=0, device=device)

    def step(given: Any, wanted: Any) -> None:
        train(given, wanted, next(batches))
        if optimizer is not None:
            optimizer.step()
        for parameter in parameters.values():
            parameter.grad = None

    def forward(given: Any, wanted: Any) -> None:
        teacher_output(task, block, copied(given) if block in contracts.teacher_writes else given)

    seconds: dict[Callable[..., None], list[float]] = {forward: [], step: []}
    errors = []
    for rows in shares:
        part = rows_of(value, slice(0, rows)), rows_of(target, slice(0, rows))
        for work, averages in seconds.items():
            average, error = _sampled(partial(work, *part))
            averages.append(average)
            errors.append(error)
    fewest = rows_of(value, slice(0, shares[0])), rows_of(target, slice(0, shares[0]))
    held = max(_held_bytes(partial(train, *fewest, n), parameters.values()) for n in range(_BATCHES_OF_MEMORY))
    trained = num_bytes(list(parameters.values()))
    weights = num_bytes(list(task.tensors_of(block).values()))
    teacher = task.teacher_blocks.tensors_of(range(block, block + 1))
    return BlockTimes(
        name=task.student_blocks.blocks[block].name,
        rows=tuple(shares),
        teacher_seconds=tuple(seconds[forward]),
        student_seconds=tuple(seconds[step]),
        input_bytes_per_row=math.ceil(contracts.before(block).num_bytes(shares[0]) / shares[0]),
        parameter_bytes=trained,
        teacher_bytes=num_bytes(list(teacher.values())),
        state_bytes=weights + trained + (state_bytes(optimizer) if optimizer is not None else 0),
        activation_bytes_per_row=math.ceil(held / shares[0]),
        relative_standard_error=max(errors),
    )


def _sampled(work: Callable[[], object]) -> tuple[float, float]:
    """Measure the mean seconds of some work, and their standard error relative to that; the first call is not counted."""
    work()
    seconds: list[float] = []
    while True:
        start = now()
        work()
        seconds.append(now() - start)
        if len(seconds) >= _FEWEST_SAMPLES:
            kept = sorted(seconds)[: max(_FEWEST_SAMPLES, math.ceil(_KEPT_SAMPLES * len(seconds)))]
            average = mean(kept)
            error = stdev(kept) / math.sqrt(len(kept)) / average if average else 0.0
            if error < _SMALL_ERROR or len(seconds) >= _MOST_SAMPLES:
                return average, error


def _held_bytes(train: Callable[[], object], parameters: Collection[Tensor]) -> int:
    """The bytes that forward, loss and backward hold at their peak, without the gradients of parameters."""
    held = LiveBytes()

    def leave_out(parameter: Tensor) -> None:
        assert parameter.grad is not None
        held.leave_out(parameter.grad)

    hooks = [parameter.register_post_accumulate_grad_hook(leave_out) for parameter in parameters]
    with held:
        train()
    for hook in hooks:
        hook.remove()
    for parameter in parameters:
        parameter.grad = None
    return held.peak
