"""A blockwise plan on virtual devices (see `transport.virtual`): blocks that only take the time that their costs say."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipestill.model.blockwise.task import BlockwiseContracts
from pipestill.model.contracts import observe
from pipestill.plan.blockwise.plan import BlockwisePlan
from pipestill.runtime.batch import windows
from pipestill.runtime.blockwise.executor import BlockwiseExecutor
from pipestill.runtime.blockwise.rank import Groups, plan_edges
from pipestill.runtime.transport.message import Message
from pipestill.runtime.transport.virtual import EventsBySegment, VirtualClock, VirtualDevice, run_timed, virtual_batches
from pipestill.runtime.world import Processes
from pipestill.schedule import Event, Lane, Trace
from pipestill.schedule.blockwise.structure import BlockwiseCosts


class VirtualWorker:
    """Stands for a rank's blocks: takes the time of each for as many rows as it is given; a row is one number."""

    def __init__(self, costs: BlockwiseCosts, rank: int, clock: VirtualClock) -> None:
        self.costs = costs
        self.clock = clock
        self.speed = costs.speeds[rank] if costs.speeds else 1.0
        self.groups: dict[int, dist.ProcessGroup] = {}
        """By block: the group that adds up its gradients, between its training step and `reduce`."""

    def teacher_output(self, block: int, value: Tensor) -> Tensor:
        """Take the time of a teacher block's forward."""
        self.clock.work(self.costs.profile.blocks[block].teacher(len(value)) / self.speed)
        return torch.zeros(len(value), 1)

    def train(self, block: int, value: Tensor | None, target: object, weight: float, batch: int, unit: int, group: Any) -> None:
        """Take the time of a student block's training step, its update included."""
        if value is not None:
            self.clock.work(self.costs.profile.blocks[block].student(len(value)) / self.speed)
        if group is not None:
            self.groups[block] = group

    def reduce(self, block: int) -> None:
        """Start when the last rank of the group is there, and take the time of an all-reduce."""
        group = self.groups.pop(block)
        moment = torch.tensor([self.clock.now()], dtype=torch.float64)
        dist.all_reduce(moment, op=dist.ReduceOp.MAX, group=group)
        self.clock.set(float(moment))
        self.clock.work(self.costs.profile.allreduce_seconds(block, dist.get_world_size(group)))

    def gradients(self, block: int) -> list[Tensor]:
        """Never called: virtual ranks are processes."""
        raise AssertionError("virtual ranks are processes")

    def set_gradients(self, block: int, summed: Sequence[Tensor]) -> None:
        """Never called: virtual ranks are processes."""
        raise AssertionError("virtual ranks are processes")

    def update(self, block: int, batch: int) -> None:
        """Take no time: the training step's includes it."""

    def state_forms(self, block: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Give one number, whatever the block."""
        return [((1,), torch.float32)]

    def state(self, block: int) -> list[Tensor]:
        """Give one number, whatever the block."""
        return [torch.zeros(1)]

    def set_state(self, block: int, tensors: Sequence[Tensor]) -> None:
        """Take no time."""


def run_virtual_blockwise(
    plan: BlockwisePlan, steps: Sequence[int], groups: Groups, timeout_seconds: float
) -> tuple[list[Trace], float]:
    """Run each phase of `plan` for as many steps as `steps` says, on virtual devices.

    There is one for each process of the default group, all of which call this. Returns on rank 0 a trace of each phase,
    and the fraction of the time by which the clocks were set back; nothing of use elsewhere.
    """
    world = Processes()
    transport = world.transport(world.rank, plan_edges(plan), timeout_seconds)  # all ranks together: one for all phases
    device = VirtualDevice(transport, plan.costs.link.latency_seconds)

    def run() -> EventsBySegment:
        return {
            number: _run_phase(plan, number, steps[number], groups, world, device)
            for number, phase in enumerate(plan.phases)
            if world.rank in phase.ranks
        }

    events, late = run_timed(world, device.clock, run)
    traces = [
        Trace(len(phase.ranks), tuple(events.get(number, ())), by_block=True, batches_per_step=phase.window)
        for number, phase in enumerate(plan.phases)
    ]
    return traces, late


def _run_phase(
    plan: BlockwisePlan, number: int, steps: int, groups: Groups, world: Processes, device: VirtualDevice
) -> list[Event]:
    """Run this rank's row of a phase, and return what it recorded."""
    phase, costs = plan.phases[number], plan.costs
    structure, local = phase.schedule.structure, phase.ranks.index(world.rank)

    def seconds(message: Message) -> float:
        if message.lane not in (Lane.TEACHER, Lane.STATE):
            return 0.0
        to = phase.ranks.index(message.destination)
        return structure.transfer_seconds(message.payload, to, costs) - device.latency

    recorder = device.recorder(local, steps + 2)
    source = windows(virtual_batches(costs.batch, steps * structure.window), structure.window)
    executor = BlockwiseExecutor(
        phase.schedule, local, ranks=phase.ranks, worker=VirtualWorker(costs, world.rank, device.clock),
        contracts=_contracts(structure.num_blocks), transport=device.transport(seconds),
        recorder=recorder, source=source if local == 0 else None, groups=groups, segment=number,
    )  # fmt: skip
    world.drive([executor.run()])
    return recorder.events()


def _contracts(num_blocks: int) -> BlockwiseContracts:
    """Contracts of models whose boundaries all pass one number a row."""
    between = observe("between virtual blocks", torch.zeros(2, 1), torch.zeros(3, 1))
    return BlockwiseContracts(between, (between,) * num_blocks, frozenset(), frozenset())
