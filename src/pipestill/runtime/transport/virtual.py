"""Virtual devices: real processes, executors and messages, while work and links wait for as long as their costs say.

Every rank keeps a clock that runs with the machine's, less what the waiting itself got wrong: a sleep that ends late, or
a process that wakes up late for a message, sets it back to the moment that was meant. So these errors do not add up,
while everything that the runtime does in between (Python, schedules, messages) takes its time. A message carries the
moment at which it arrives, by the costs' link, and nobody takes it sooner.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipestill.runtime.batch import Batch
from pipestill.runtime.record import Recorder
from pipestill.runtime.transport.message import Message
from pipestill.runtime.transport.protocol import Transport, World
from pipestill.schedule import Event, Lane

_UNTIMED = (Lane.INPUT,)  # samples are sent a step ahead, and costs do not know how long they travel
_PROMPT_SECONDS = 5e-4  # a look at the transport that takes longer has waited


class VirtualClock:
    """Seconds that all ranks of this machine agree on: the machine's clock, less this rank's own `late` seconds."""

    def __init__(self) -> None:
        self.late = 0.0

    def now(self) -> float:
        """This moment, in seconds."""
        return time.perf_counter() - self.late

    def work(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self.wait_until(self.now() + seconds)

    def wait_until(self, moment: float) -> None:
        """Sleep until `moment`, and set the clock back by what the sleep took too long."""
        left = moment - self.now()
        if left > 0:
            time.sleep(left)
            self.set(moment)

    def set(self, moment: float) -> None:
        """Set the clock to `moment`."""
        self.late = time.perf_counter() - moment


@dataclass(eq=False)
class VirtualTransport:
    """Real messages over another transport, each with the moment at which it arrives as a last tensor.

    `seconds(message)` is how long the message occupies its edge, and `latency` how many seconds it travels after that.
    """

    inner: Transport
    seconds: Callable[[Message], float]
    latency: float
    clock: VirtualClock

    def __post_init__(self) -> None:
        self.free: dict[int, float] = {}
        """By destination: the moment from which the edge to that rank is free."""
        self.arrived_tensors: list[Tensor] = []
        """Those of the message that arrived last."""

    def send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        """Send tensors together with the moment at which they arrive."""
        if message.lane in _UNTIMED:
            self.inner.send(message, tensors)
            return
        sent = max(self.clock.now(), self.free.get(message.destination, 0.0)) + self.seconds(message)
        self.free[message.destination] = sent
        self.inner.send(message, [*tensors, torch.tensor([sent + self.latency], dtype=torch.float64)])

    def post(self, message: Message, buffers: Sequence[Tensor]) -> None:
        """Announce a receive, with one more buffer for the moment of arrival."""
        moment = [] if message.lane in _UNTIMED else [torch.empty(1, dtype=torch.float64)]
        self.inner.post(message, [*buffers, *moment])

    def arrived(self, message: Message) -> bool:
        """Wait for a message, and then until it arrives by the clock."""
        begin, real = self.clock.now(), time.perf_counter()
        self.inner.arrived(message)
        self.arrived_tensors = self.inner.take(message)
        if message.lane in _UNTIMED:
            return True
        arrival = float(self.arrived_tensors.pop())
        if arrival > begin or time.perf_counter() - real > _PROMPT_SECONDS:
            self.clock.wait_until(arrival)
            self.clock.set(max(begin, arrival))
        return True

    def take(self, message: Message) -> list[Tensor]:
        """The tensors of the message that has just arrived."""
        return self.arrived_tensors

    def settle(self, message: Message) -> None:
        """Let go of a message that its receiver has."""
        self.inner.settle(message)

    def flush(self, segment: int) -> None:
        """Wait until everything sent in a segment has left."""
        self.inner.flush(segment)


class VirtualRecorder(Recorder):
    """Records work by the virtual clock."""

    def __init__(self, rank: int, clock: VirtualClock, num_steps: int) -> None:
        super().__init__(rank, torch.device("cpu"), num_steps)
        self.clock = clock

    def _now(self) -> object:
        return self.clock.now()


@dataclass(eq=False)
class VirtualDevice:
    """One rank's virtual device: its clock, and real messages, which arrive `latency` seconds after they have left."""

    messages: Transport
    latency: float

    def __post_init__(self) -> None:
        self.clock = VirtualClock()

    def transport(self, seconds: Callable[[Message], float]) -> VirtualTransport:
        """Make the transport of an executor; `seconds` tells how long a message occupies its edge."""
        return VirtualTransport(self.messages, seconds, self.latency, self.clock)

    def recorder(self, rank: int, num_steps: int) -> VirtualRecorder:
        """Make the recorder of an executor."""
        return VirtualRecorder(rank, self.clock, num_steps)


EventsBySegment = dict[int, list[Event]]


def run_timed(world: World, clock: VirtualClock, run: Callable[[], EventsBySegment]) -> tuple[EventsBySegment, float]:
    """Call `run` on all ranks at once.

    Returns on rank 0 the events of all ranks, by segment and in the order in which they started, and the fraction of the
    time by which the clocks were set back, on average over ranks; no events and 0 elsewhere.
    """
    world.barrier()
    begin = time.perf_counter()
    events = run()
    late = clock.late / (time.perf_counter() - begin)
    of_ranks, lates = world.gather([events]), world.gather([late])
    if not world.is_main:
        return {}, 0.0
    segments = sorted({segment for mine in of_ranks for segment in mine})
    joined = {
        segment: sorted((e for mine in of_ranks for e in mine.get(segment, ())), key=lambda event: event.start)
        for segment in segments
    }
    return joined, sum(lates) / len(lates)


def virtual_batches(rows: int, count: int) -> Iterator[Batch]:
    """Yield batches of one number a row."""
    inputs = torch.zeros(rows, 1)
    for number in range(count):
        yield Batch(rows, 0, number == count - 1, inputs)
