"""A pipeline on virtual devices (see `transport.virtual`): stages that only take the time that their costs say."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.costs import StageCosts
from pipestill.model.contracts import observe
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.plan import Plan
from pipestill.runtime.pipeline.boundaries import Boundaries
from pipestill.runtime.pipeline.executor import PipelineExecutor
from pipestill.runtime.pipeline.features import Taught
from pipestill.runtime.transport.message import Message
from pipestill.runtime.transport.virtual import EventsBySegment, VirtualClock, VirtualDevice, run_timed, virtual_batches
from pipestill.runtime.world import Processes
from pipestill.schedule import Action, Lane, Op, Role, Trace
from pipestill.schedule.comms import edges
from pipestill.schedule.pipeline.structure import PipelineStructure


@dataclass(eq=False)
class VirtualStage:
    """Stands for a stage of one of the models: takes its time, and gives one number a row."""

    stage: int
    structure: PipelineStructure
    costs: StageCosts
    clock: VirtualClock

    def __post_init__(self) -> None:
        self.seconds = {a: self.structure.work_seconds(a, self.costs) for a in self.structure.actions()}

    def _work(self, role: Role, op: Op, unit: int | None) -> None:
        self.clock.work(self.seconds[Action(role, self.stage, op, unit, 0)])

    def end_batch(self) -> None:
        """Take no time."""


class VirtualStudent(VirtualStage):
    """Stands for a stage of the student."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.counted: list[nn.Parameter] = []
        self.rows: dict[tuple[int, int], int] = {}
        """By (step, unit) between its forward and its backward: how many rows it has."""

    def enter(self, tensors: Sequence[Tensor], rows: int, unit: int, length: int) -> tuple[Any, list[Tensor | None]]:
        """Take no time."""
        return tensors[0], []

    def forward(self, value: Any, gradients: list[Tensor | None], step: int, unit: int, rows: int, length: int) -> Any:
        """Take the time of a forward."""
        self._work(Role.STUDENT, Op.FORWARD, unit)
        self.rows[step, unit] = rows
        return torch.zeros(rows, 1)

    def infer(self, value: Any, step: int, unit: int) -> Any:
        """Never called: virtual devices only train."""
        raise AssertionError("virtual devices only train")

    def loss(
        self, number: int, outputs: Mapping[int, Any], teacher: Mapping[int, Any], target: Any, step: int,
        factors: Sequence[float],
    ) -> None:  # fmt: skip
        """Take the time of a loss."""
        self._work(Role.STUDENT, Op.LOSS, number)

    def feature_losses(
        self, number: int, units: Sequence[int], taught: Sequence[Mapping[int, Tensor]], target: Any, step: int,
        factors: Callable[[Sequence[str]], Sequence[float]],
    ) -> None:  # fmt: skip
        """Take the time of a loss, unless the loss of the outputs has."""
        if self.stage != self.structure.last:
            self._work(Role.STUDENT, Op.LOSS, number)

    def backward(self, gradients: Sequence[Tensor] | None, step: int, unit: int) -> list[Tensor]:
        """Take the time of a backward, or of its first half."""
        self._work(Role.STUDENT, self.structure.backward_ops[0], unit)
        return [torch.zeros(self.rows.pop((step, unit)), 1)]

    def weight_gradients(self, step: int, unit: int) -> None:
        """Take the time of the second half of a backward."""
        self._work(Role.STUDENT, Op.WEIGHT, unit)

    def tied_gradients(self) -> list[Tensor]:
        """Give nothing, in no time."""
        return [torch.zeros(0)]

    def add_up_tied(self, gradients: Mapping[range, Sequence[Tensor]]) -> None:
        """Take no time."""

    def clip(self, squares: Tensor, largest: float) -> None:
        """Take no time."""

    def update(self, step: int) -> None:
        """Take the time of an update."""
        self._work(Role.STUDENT, Op.UPDATE, None)


class VirtualTeacher(VirtualStage):
    """Stands for a stage of the teacher."""

    def forward(self, value: Tensor, step: int, unit: int) -> Taught:
        """Take the time of a forward."""
        self._work(Role.TEACHER, Op.FORWARD, unit)
        output = torch.zeros(len(value), 1)
        pairs = enumerate(self.structure.features)
        return Taught(output, {number: output for number, (_, stage) in pairs if stage == self.stage})

    def note(self) -> None:
        """Take no time."""

    def follow(self, step: int) -> None:
        """Take the time of an update of the average."""
        self._work(Role.TEACHER, Op.EMA, None)


def run_virtual_pipeline(plan: Plan, steps: int, timeout_seconds: float) -> tuple[list[Trace], float]:
    """Run `plan` for some steps on virtual devices: one for each process of the default group, all of which call this.

    Returns on rank 0 its only trace, and the fraction of the time by which the clocks were set back; nothing of use elsewhere.
    """
    schedule, costs, structure = plan.schedule, plan.stage_costs, plan.schedule.structure
    world, latency = Processes(), costs.link.latency_seconds
    rank = world.rank
    device = VirtualDevice(world.transport(rank, edges(structure), timeout_seconds), latency)
    recorder = device.recorder(rank, steps + 1)

    def seconds(message: Message) -> float:
        if message.lane in (Lane.TOKEN, Lane.TARGET):
            return 0.0
        return structure.transfer_seconds(message.payload, message.destination, costs) - latency

    stages = [range(i, i + 1) for i in range(plan.num_devices)]
    boundaries = Boundaries(
        structure, _contracts(structure, plan.num_devices), stages, stages, num_trained=(0,) * plan.num_devices, views=False,
        taps=range(len(structure.features)),
    )  # fmt: skip
    executor = PipelineExecutor(
        schedule, rank, boundaries=boundaries, student=VirtualStudent(rank, structure, costs, device.clock),
        teacher=VirtualTeacher(rank, structure, costs, device.clock) if structure.teacher_ranks else None,
        transport=device.transport(seconds), recorder=recorder,
        source=virtual_batches(structure.num_microbatches, steps) if rank == 0 else None,
        largest_norm=1.0,
    )  # fmt: skip

    def run() -> EventsBySegment:
        world.drive([executor.run()])
        return {0: recorder.events()}

    events, late = run_timed(world, device.clock, run)
    return [Trace(plan.num_devices, tuple(events.get(0, ())))], late


def _contracts(structure: PipelineStructure, num_blocks: int) -> PipelineContracts:
    """Contracts of models whose boundaries all pass one number a row, and one back."""
    few, more = torch.zeros(2, 1, requires_grad=True), torch.zeros(3, 1, requires_grad=True)
    between = observe("between virtual stages", few, more, ([torch.zeros(2, 1)], [torch.zeros(3, 1)]))
    blocks = (between,) * num_blocks
    return PipelineContracts(
        inputs=between,
        targets=observe("no targets", None, None),
        student=(blocks,) * structure.views,
        teacher=(blocks,) * structure.teacher_views,
        loss_parts=("loss",),
        taps=(observe("features", torch.zeros(2, 1), torch.zeros(3, 1)),) * len(structure.features),
        copies=frozenset(),
    )
