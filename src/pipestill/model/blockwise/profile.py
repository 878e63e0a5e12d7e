"""Measures what teacher blocks and their student blocks take, for the search of a blockwise plan."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.costs import Link
from pipestill.model.blockwise.contracts import BlockwiseContracts
from pipestill.model.blockwise.task import Blockwise
from pipestill.model.blockwise.training import teacher_output, train_block, untouched_blocks
from pipestill.model.live_bytes import LiveBytes
from pipestill.model.nests import copied, distinct_tensors, rows_of, to_device
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes

_FEWEST, _MOST = 5, 40  # samples of each point
_LOOKED_AT = 8  # batches whose memory is counted, for blocks that do other work for each
_ENOUGH = 0.03  # standard error of the mean, relative to it: 95 % of means are then within 6 % of the true one


def measure_blocks(
    task: Blockwise,
    contracts: BlockwiseContracts,
    inputs: Any,
    *,
    batch: int,
    devices: int,
    optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer],
    link: Link | None = None,
    device: torch.device | None = None,
) -> BlockProfile:
    """Seconds of every block's teacher forward and student step (forward, backward, update) at each share of a batch.

    Shares are those of 1 to `devices` ranks. Each point is sampled, on real activations (those of `inputs`, repeated to as
    many rows), until the standard error of its mean is below 3 %, at least 5 and at most 40 times; what is left of it goes
    into the profile. Nothing in the models changes. Memory: parameters, gradients and the optimizer's state as they are
    after a step, and what a student's step holds at its peak.
    """
    device = device or torch.device("cpu")
    every = range(task.num_blocks)
    tensors = [
        *task.teacher_blocks.tensors_of(every).values(),
        *(t for i in every for t in task.tensors_of(i).values()),
    ]
    homes = [tensor.device for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(device)
    shares = sorted({math.ceil(batch / k) for k in range(1, devices + 1)})
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
    optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer], device: torch.device,
) -> BlockTimes:  # fmt: skip
    parameters = task.parameters_of(block)
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    stepper = optimizer(copies) if copies else None
    for copy in copies.values():
        copy.grad = torch.zeros_like(copy)
    batches = count()  # a block may do other work for each (a supernet's random paths): the mean is wanted

    def step(given: Any, wanted: Any) -> None:
        given = copied(given) if block in contracts.student_writes else given
        train_block(task, block, given, wanted, 1.0, seed=0, batch=next(batches), unit=0, device=device)
        if stepper is not None:
            stepper.step()
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
    memory = sum(_bytes(t) for state in (stepper.state.values() if stepper else ()) for t in state.values())
    given, wanted = rows_of(value, slice(0, shares[0])), rows_of(target, slice(0, shares[0]))
    held = max(_held_bytes(task, contracts, block, given, wanted, device, batch) for batch in range(_LOOKED_AT))
    weights = sum(map(_bytes, task.tensors_of(block).values()))
    trained = sum(map(_bytes, parameters.values()))
    return BlockTimes(
        name=task.student_blocks.blocks[block].name,
        rows=tuple(shares),
        teacher_seconds=tuple(seconds[forward]),
        student_seconds=tuple(seconds[step]),
        input_bytes_per_row=math.ceil(contracts.before(block).num_bytes(shares[0]) / shares[0]),
        parameter_bytes=trained,
        teacher_bytes=sum(map(_bytes, task.teacher_blocks.tensors_of(range(block, block + 1)).values())),
        state_bytes=weights + trained + memory,
        activation_bytes_per_row=math.ceil(held / shares[0]),
        relative_standard_error=max(errors),
    )


def _sampled(work: Callable[[], object]) -> tuple[float, float]:
    """Mean seconds, and their standard error relative to that; the first call is not counted."""
    work()
    seconds: list[float] = []
    while True:
        start = now()
        work()
        seconds.append(now() - start)
        if len(seconds) >= _FEWEST:
            kept = sorted(seconds)[: max(_FEWEST, math.ceil(0.9 * len(seconds)))]  # the slowest tenth is the machine's
            average = mean(kept)
            error = stdev(kept) / math.sqrt(len(kept)) / average if average else 0.0
            if error < _ENOUGH or len(seconds) >= _MOST:
                return average, error


def now() -> float:
    """Seconds, once everything that a GPU was given is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _held_bytes(
    task: Blockwise,
    contracts: BlockwiseContracts,
    block: int,
    given: Any,
    wanted: Any,
    device: torch.device,
    batch: int,
) -> int:
    """What a student's step holds at its peak, without gradients of weights, which are the block's own."""
    held = LiveBytes()

    def leave_out(parameter: Tensor) -> None:
        assert parameter.grad is not None
        held.leave_out(parameter.grad)

    parameters = task.parameters_of(block).values()
    hooks = [parameter.register_post_accumulate_grad_hook(leave_out) for parameter in parameters]
    with held:
        given = copied(given) if block in contracts.student_writes else given
        train_block(task, block, given, wanted, 1.0, seed=0, batch=batch, unit=0, device=device)
    for hook in hooks:
        hook.remove()
    for parameter in parameters:
        parameter.grad = None
    return held.peak


def _bytes(value: object) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
