"""Virtual devices for blocks that learn alone: real processes, executor and transport, but work waits (see `virtual`)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipestill.model.blockwise.contracts import BlockwiseContracts
from pipestill.model.contracts import observe
from pipestill.plan.blockwise.plan import BlockwisePlan, Phase
from pipestill.runtime.batch import Batch
from pipestill.runtime.blockwise.executor import BlockwiseExecutor
from pipestill.runtime.blockwise.groups import Groups, plan_edges
from pipestill.runtime.blockwise.windows import windows
from pipestill.runtime.transport.protocol import Message, Transport
from pipestill.runtime.transport.virtual import VirtualClock, VirtualRecorder, VirtualTransport
from pipestill.runtime.world import Processes
from pipestill.schedule import Event, Lane, Trace
from pipestill.schedule.blockwise.costs import BlockwiseCosts


class VirtualWorker:
    """Takes the time of each block for as many rows as it is given; a row is one number."""

    def __init__(self, costs: BlockwiseCosts, rank: int, clock: VirtualClock) -> None:
        self.costs, self.clock = costs, clock
        self.speed = costs.speeds[rank] if costs.speeds else 1.0
        self.sharing: dict[int, dist.ProcessGroup] = {}

    def teach(self, block: int, value: Tensor) -> Tensor:
        self.clock.work(self.costs.profile.blocks[block].teacher(len(value)) / self.speed)
        return torch.zeros(len(value), 1)

    def learn(
        self, block: int, value: Tensor | None, target: object, share: float, batch: int, unit: int, group: Any
    ) -> None:
        if value is not None:
            self.clock.work(self.costs.profile.blocks[block].student(len(value)) / self.speed)
        if group is not None:
            self.sharing[block] = group

    def reduce(self, block: int) -> None:
        """Start when the last rank of the group is there, and take the time of an all-reduce."""
        group = self.sharing.pop(block)
        moment = torch.tensor([self.clock.now()], dtype=torch.float64)
        dist.all_reduce(moment, op=dist.ReduceOp.MAX, group=group)
        self.clock.set(float(moment))
        self.clock.work(self.costs.profile.allreduce_seconds(block, dist.get_world_size(group)))

    def gradients(self, block: int) -> list[Tensor]:
        raise AssertionError("ranks are processes")

    def set_gradients(self, block: int, summed: Sequence[Tensor]) -> None:
        raise AssertionError("ranks are processes")

    def update(self, block: int, batch: int) -> None:
        """Is part of the student's step."""

    def state_forms(self, block: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [((1,), torch.float32)]

    def state(self, block: int) -> list[Tensor]:
        return [torch.zeros(1)]

    def set_state(self, block: int, tensors: Sequence[Tensor]) -> None:
        """Nothing to keep."""


def run_virtual_blocks(
    plan: BlockwisePlan, steps: Sequence[int], groups: Groups, timeout_seconds: float
) -> tuple[list[Trace], float] | None:
    """Run each phase of `plan` for as many steps as `steps` says, on the virtual devices of this group of processes.

    On rank 0: what happened in each phase, and which share of the time the clocks were set back by on average; None
    elsewhere.
    """
    world, clock, recorded = Processes(), VirtualClock(), dict[int, list[Event]]()
    transport = world.transport(world.rank, plan_edges(plan), timeout_seconds)  # all ranks together: one for all phases
    dist.barrier()
    begin = time.perf_counter()
    for number, phase in enumerate(plan.phases):
        if world.rank in phase.ranks:
            recorded[number] = _run_phase(plan, number, phase, steps[number], groups, clock, world.rank, transport)
    share = clock.late / (time.perf_counter() - begin)
    told, shares = world.gather([recorded]), world.gather([share])
    if world.rank:
        return None
    traces = []
    for number, phase in enumerate(plan.phases):
        events = sorted((e for mine in told for e in mine.get(number, ())), key=lambda event: event.start)
        traces.append(Trace(len(phase.ranks), tuple(events), by_block=True, batches_per_step=phase.window))
    return traces, sum(shares) / len(shares)


def _run_phase(
    plan: BlockwisePlan, number: int, phase: Phase, steps: int, groups: Groups, clock: VirtualClock, rank: int,
    transport: Transport,
) -> list[Event]:  # fmt: skip
    structure, costs, local = phase.schedule.structure, plan.costs, phase.ranks.index(rank)
    latency = costs.link.latency_seconds

    def seconds(message: Message) -> float:
        if message.lane not in (Lane.TEACHER, Lane.STATE):
            return 0.0
        to = phase.ranks.index(message.destination)
        return structure.transfer_seconds(message.payload, to, costs) - latency

    recorder = VirtualRecorder(local, clock, steps + 2)
    source = windows(_batches(costs.batch, steps * structure.window), structure.window)
    executor = BlockwiseExecutor(
        phase.schedule, local, ranks=phase.ranks, worker=VirtualWorker(costs, rank, clock),
        contracts=_contracts(structure.num_blocks), transport=VirtualTransport(transport, seconds, latency, clock),
        recorder=recorder, source=source if local == 0 else None, groups=groups, segment=number,
    )  # fmt: skip
    for message in executor.run():
        raise AssertionError(f"the transport of a process waits itself, but {message} was left to us")
    return recorder.events()


def _contracts(num_blocks: int) -> BlockwiseContracts:
    between = observe("between virtual blocks", torch.zeros(2, 1), torch.zeros(3, 1))
    return BlockwiseContracts(between, (between,) * num_blocks, frozenset(), frozenset())


def _batches(rows: int, count: int) -> Iterator[Batch]:
    inputs = torch.zeros(rows, 1)
    for number in range(count):
        yield Batch(rows, 0, number == count - 1, inputs)
