"""Virtual devices: real processes, executor and transport, but work waits for as long as its costs say.

Every rank keeps a clock that runs with the machine's, less what the waiting itself got wrong: a sleep that ends late, or
a process that wakes up late for a message, sets it back to the moment that was meant. So these errors do not add up,
while everything that the runtime does between (Python, schedules, messages) takes its time. A message carries the time at
which it arrives, by the costs' link, and nobody takes it sooner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipestill.costs import StageCosts
from pipestill.model.contracts import observe
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.plan import Plan
from pipestill.runtime.batch import Batch
from pipestill.runtime.pipeline.executor import PipelineExecutor
from pipestill.runtime.record import Recorder
from pipestill.runtime.transport.protocol import Message, Transport
from pipestill.runtime.world import Processes
from pipestill.schedule import Action, Lane, Op, Role, Schedule, Trace
from pipestill.schedule.comms import edges
from pipestill.schedule.pipeline.costs import action_seconds, transfer_seconds
from pipestill.schedule.pipeline.structure import PipelineStructure

_UNTIMED = (Lane.INPUT,)  # samples are sent a step ahead, and costs do not know of their way
_PROMPT_SECONDS = 5e-4  # a look at the transport that takes longer has waited


class VirtualClock:
    """Seconds that all ranks of this machine share, each less its own `late` seconds."""

    def __init__(self) -> None:
        self.late = 0.0

    def now(self) -> float:
        return time.perf_counter() - self.late

    def work(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self.wait_until(self.now() + seconds)

    def wait_until(self, moment: float) -> None:
        """Sleep until then; what the sleep takes too long does not count."""
        left = moment - self.now()
        if left > 0:
            time.sleep(left)
            self.set(moment)

    def set(self, moment: float) -> None:
        """It is `moment` now."""
        self.late = time.perf_counter() - moment


class VirtualStage:
    """Stands for a stage of one of the models: takes its time, and gives one number a row."""

    def __init__(self, stage: int, schedule: Schedule[PipelineStructure], costs: StageCosts, clock: VirtualClock) -> None:
        self.stage, self.structure, self.clock = stage, schedule.structure, clock
        self.seconds = {a: action_seconds(a, schedule.structure, costs) for a in schedule.structure.actions()}

    def _work(self, role: Role, op: Op, unit: int | None) -> None:
        self.clock.work(self.seconds[Action(role, self.stage, op, unit, 0)])

    def end_batch(self) -> None:
        """Takes no time."""


class VirtualStudent(VirtualStage):
    """The student's stage."""

    def __init__(self, stage: int, schedule: Schedule[PipelineStructure], costs: StageCosts, clock: VirtualClock) -> None:
        super().__init__(stage, schedule, costs, clock)
        self.parameters: dict[str, nn.Parameter] = {}
        self.rows: dict[tuple[int, int], int] = {}  # of each unit between its forward and its backward

    def enter(self, tensors: Sequence[Tensor], rows: int, unit: int, length: int) -> tuple[Any, list[Tensor | None]]:
        return tensors[0], []

    def forward(self, value: Any, gradients: list[Tensor | None], step: int, unit: int, rows: int, length: int) -> Any:
        self._work(Role.STUDENT, Op.FORWARD, unit)
        self.rows[step, unit] = rows
        return torch.zeros(rows, 1)

    def infer(self, value: Any, step: int, unit: int) -> Any:
        raise AssertionError("virtual devices only train")

    def loss(
        self, number: int, outputs: Mapping[int, Any], teacher: Mapping[int, Any], target: Any, step: int, share: float
    ) -> None:
        self._work(Role.STUDENT, Op.LOSS, number)

    def backward(self, gradients: Sequence[Tensor] | None, step: int, unit: int) -> list[Tensor]:
        self._work(Role.STUDENT, self.structure.backward_ops[0], unit)
        return [torch.zeros(self.rows.pop((step, unit)), 1)]

    def weight_gradients(self, step: int, unit: int) -> None:
        self._work(Role.STUDENT, Op.WEIGHT, unit)

    def clip(self, squares: Tensor, largest: float) -> None:
        """Takes no time."""

    def update(self, lr_factor: float, decay_factor: float) -> None:
        self._work(Role.STUDENT, Op.UPDATE, None)


class VirtualTeacher(VirtualStage):
    """The teacher's stage."""

    def forward(self, value: Tensor, step: int, unit: int) -> Any:
        self._work(Role.TEACHER, Op.FORWARD, unit)
        return torch.zeros(len(value), 1)

    def note(self) -> None:
        """Takes no time."""

    def follow(self, step: int) -> None:
        self._work(Role.TEACHER, Op.EMA, None)


class VirtualTransport:
    """Real messages, each with the moment at which it arrives as a last tensor.

    `seconds(message)` is how long its edge is taken by it, `latency` how long it is on its way after that.
    """

    def __init__(
        self, inner: Transport, seconds: Callable[[Message], float], latency: float, clock: VirtualClock
    ) -> None:
        self.inner, self.seconds, self.latency, self.clock = inner, seconds, latency, clock
        self.free: dict[int, float] = {}  # when the edge to a rank is

    def send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        if message.lane in _UNTIMED:
            self.inner.send(message, tensors)
            return
        sent = max(self.clock.now(), self.free.get(message.destination, 0.0)) + self.seconds(message)
        self.free[message.destination] = sent
        self.inner.send(message, [*tensors, torch.tensor([sent + self.latency], dtype=torch.float64)])

    def post(self, message: Message, buffers: Sequence[Tensor]) -> None:
        stamp = [] if message.lane in _UNTIMED else [torch.empty(1, dtype=torch.float64)]
        self.inner.post(message, [*buffers, *stamp])

    def arrived(self, message: Message) -> bool:
        begin, real = self.clock.now(), time.perf_counter()
        self.inner.arrived(message)
        self.stamps = self.inner.take(message)
        if message.lane in _UNTIMED:
            return True
        arrival = float(self.stamps.pop())
        if arrival > begin or time.perf_counter() - real > _PROMPT_SECONDS:
            self.clock.wait_until(arrival)
            self.clock.set(max(begin, arrival))
        return True

    def take(self, message: Message) -> list[Tensor]:
        return self.stamps

    def settle(self, message: Message) -> None:
        self.inner.settle(message)

    def flush(self, segment: int) -> None:
        self.inner.flush(segment)


class VirtualRecorder(Recorder):
    """Times work by the virtual clock."""

    def __init__(self, rank: int, clock: VirtualClock, num_steps: int) -> None:
        super().__init__(rank, torch.device("cpu"), num_steps)
        self.clock = clock

    def _now(self) -> object:
        return self.clock.now()


def run_virtual(plan: Plan, steps: int, timeout_seconds: float) -> tuple[Trace, float] | None:
    """Run `plan` for `steps` steps on the virtual devices of this group of processes.

    On rank 0: what happened, and which share of the time the clocks were set back by on average; None elsewhere.
    """
    schedule, costs, world = plan.schedule, plan.stage_costs, Processes()
    rank, clock = world.rank, VirtualClock()
    structure = schedule.structure
    few, more = torch.zeros(2, 1, requires_grad=True), torch.zeros(3, 1, requires_grad=True)
    contract = observe("between virtual stages", few, more, ([torch.zeros(2, 1)], [torch.zeros(3, 1)]))
    nothing = observe("no targets", None, None)
    count = plan.num_devices
    contracts = PipelineContracts(
        contract, nothing, ((contract,) * count,) * structure.views, ((contract,) * count,) * structure.teacher_views,
        ("loss",), frozenset(),
    )  # fmt: skip
    stages = [range(i, i + 1) for i in range(count)]
    recorder = VirtualRecorder(rank, clock, steps + 1)
    student, teacher = VirtualStudent(rank, schedule, costs, clock), VirtualTeacher(rank, schedule, costs, clock)
    transport = world.transport(rank, edges(structure), timeout_seconds)

    def seconds(message: Message) -> float:
        if message.lane in (Lane.TOKEN, Lane.TARGET):
            return 0.0
        return transfer_seconds(message.payload, structure, costs) - costs.link.latency_seconds

    executor = PipelineExecutor(
        schedule, rank, contracts=contracts, student_stages=stages, teacher_stages=stages,
        student=student, teacher=teacher if structure.teacher_ranks else None,
        transport=VirtualTransport(transport, seconds, costs.link.latency_seconds, clock), recorder=recorder,
        source=_batches(structure.num_microbatches, steps) if rank == 0 else None, clip=1.0, num_trained=(0,) * count,
    )  # fmt: skip
    dist.barrier()
    begin = time.perf_counter()
    for message in executor.run():
        raise AssertionError(f"the transport of a process waits itself, but {message} was left to us")
    share = clock.late / (time.perf_counter() - begin)
    events, shares = world.gather([recorder.events()]), world.gather([share])
    if rank:
        return None
    return Trace(count, tuple(sorted((e for of in events for e in of), key=lambda e: e.start))), sum(shares) / count


def _batches(rows: int, steps: int) -> Iterator[Batch]:
    inputs = torch.zeros(rows, 1)
    for step in range(steps):
        yield Batch(rows, 0, step == steps - 1, inputs)
