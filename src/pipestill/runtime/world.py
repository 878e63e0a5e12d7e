"""Where the ranks are: all in this process, or one in each process of a group."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from statistics import median
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipestill.costs import Link
from pipestill.errors import ConfigError, DeviceError
from pipestill.runtime import shared_memory
from pipestill.runtime.executor import Waiting
from pipestill.runtime.process_group import ProcessGroup
from pipestill.runtime.shared_memory import SharedMemory
from pipestill.runtime.transport import InProcess, Message, Transport
from pipestill.schedule import Action, Lane, Op, Role

T = TypeVar("T")
_LOAD_BYTES = 4_000_000
_MESSAGE_BYTES = 500_000
_ROUNDS = 30
_DEADLINE_SECONDS = 60.0


class World(Protocol):
    """The ranks of a run, and what they do together outside the schedule."""

    num_ranks: int
    ranks: Sequence[int]
    """The ranks that live in this process."""

    @property
    def is_main(self) -> bool:
        """Whether rank 0, which reads data and reports, lives here."""

    def transport(self, rank: int, edges: Iterable[tuple[int, int, Lane]], timeout_seconds: float) -> Transport:
        """The rank's end of every lane; called on all ranks together."""

    def backend(self, device_type: str) -> str:
        """What moves tensors between the ranks, once there is a transport."""

    def drive(self, runs: Sequence[Waiting]) -> None:
        """Run the local ranks' generators to their end."""

    def share(self, value: T | None, rank: int = 0) -> T:
        """The value of `rank`, everywhere."""

    def gather(self, values: Sequence[T]) -> list[T]:
        """One value per local rank -> all of them in order of rank, on the process of rank 0 (elsewhere empty)."""

    def copy_from(self, tensors: Sequence[Tensor], rank: int) -> None:
        """Overwrite everybody's CPU `tensors` with those of `rank`."""

    def barrier(self) -> None:
        """Wait for every process."""

    def claim(self, name: str) -> bool:
        """Whether this is the first rank to ask for `name`."""

    def measure_link(self, work_seconds: float, device: torch.device) -> Link:
        """Latency and bandwidth between two ranks, of tensors on `device`; for work of about `work_seconds` on the CPU (0: for
        work elsewhere) what it takes a rank to wake up for it, and what messages keep it from it. Free where ranks share a
        process. On all ranks together.
        """


class OneProcess:
    """Ranks that take turns in this process."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.ranks: Sequence[int] = range(num_ranks)
        self.is_main = True
        self._boxes: dict[Message, list[Tensor]] = {}
        self._claimed = set[str]()

    def transport(self, rank: int, edges: Iterable[tuple[int, int, Lane]], timeout_seconds: float) -> Transport:
        return InProcess(self._boxes)

    def backend(self, device_type: str) -> str:
        return f"in-process {device_type}"

    def drive(self, runs: Sequence[Waiting]) -> None:
        """Resume each generator in turn until it waits; the schedule is proved, so somebody can always go on."""
        self._boxes.clear()
        alive = dict(enumerate(runs))
        waits: dict[int, Message] = {}
        while alive:
            moved = False
            for rank, run in list(alive.items()):
                before = waits.get(rank)
                if before is not None and before not in self._boxes:
                    continue
                moved = True
                try:
                    waits[rank] = next(run)
                except StopIteration:
                    del alive[rank]
            if not moved:
                stuck = "; ".join(
                    f"rank {rank} waits for {message}" for rank, message in waits.items() if rank in alive
                )
                raise RuntimeError(f"no rank can go on: {stuck}")

    def share(self, value: T | None, rank: int = 0) -> T:
        assert value is not None
        return value

    def gather(self, values: Sequence[T]) -> list[T]:
        return list(values)

    def copy_from(self, tensors: Sequence[Tensor], rank: int) -> None:
        """Everybody's tensors are the same ones."""

    def barrier(self) -> None:
        """Nobody else to wait for."""

    def claim(self, name: str) -> bool:
        first = name not in self._claimed
        self._claimed.add(name)
        return first

    def measure_link(self, work_seconds: float, device: torch.device) -> Link:
        return Link()


class Processes:
    """One rank in each process of torch.distributed's default group, or in each of its first `num_ranks`."""

    def __init__(self, num_ranks: int | None = None) -> None:
        self.num_ranks = num_ranks or dist.get_world_size()
        self.group: dist.ProcessGroup | None = None
        if self.num_ranks < dist.get_world_size():
            self.group = dist.new_group(list(range(self.num_ranks)), use_local_synchronization=True)
        self.rank = dist.get_rank()
        self.ranks: Sequence[int] = (self.rank,)
        self.is_main = self.rank == 0
        self.num_near = 0  # other ranks that share memory with this one

    def transport(self, rank: int, edges: Iterable[tuple[int, int, Lane]], timeout_seconds: float) -> Transport:
        lanes = ProcessGroup(timeout_seconds, edges, among_some=self.group is not None)
        if "nccl" in str(dist.get_backend_config()):
            return lanes
        peers = shared_memory.connect(range(self.num_ranks), self.group, timeout_seconds)
        self.num_near = len(peers)
        return SharedMemory(timeout_seconds, peers, lanes)

    def backend(self, device_type: str) -> str:
        if device_type != "cpu":
            return "nccl"
        ways = ["shared memory"] * (self.num_near > 0) + ["gloo"] * (self.num_near < self.num_ranks - 1)
        return " and ".join(ways) or "gloo"

    def drive(self, runs: Sequence[Waiting]) -> None:
        for run in runs:
            for message in run:
                raise AssertionError(f"the transport of a process waits itself, but {message} was left to us")

    def share(self, value: T | None, rank: int = 0) -> T:
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=rank, group=self.group)
        shared: T = box[0]
        return shared

    def gather(self, values: Sequence[T]) -> list[T]:
        (value,) = values
        box: list[Any] | None = [None] * self.num_ranks if self.is_main else None
        dist.gather_object(value, box, dst=0, group=self.group)
        return box or []

    def copy_from(self, tensors: Sequence[Tensor], rank: int) -> None:
        for tensor in tensors:
            if tensor.numel():
                dense = tensor.contiguous()  # broadcast takes nothing else, such as weights in channels_last
                dist.broadcast(dense, src=rank, group=self.group)
                if dense is not tensor:
                    tensor.copy_(dense)

    def barrier(self) -> None:
        dist.barrier(self.group)

    def claim(self, name: str) -> bool:
        first: bool = dist.distributed_c10d._get_default_store().add(f"pipestill-{name}", 1) == 1
        return first

    def measure_link(self, work_seconds: float, device: torch.device) -> Link:
        """From round trips of 1 byte and of `_LOAD_BYTES` between ranks 0 and 1, from taking turns at some work, and from work
        of both at once with messages between, over a transport such as runs have.
        """
        if self.num_ranks < 2:
            return Link()
        transport = self.transport(self.rank, (), _DEADLINE_SECONDS)
        sizes = (1, 1, _LOAD_BYTES)  # the first transfer connects
        _, latency, loaded = (
            self._turn_seconds(transport, torch.zeros(size, dtype=torch.uint8, device=device)) for size in sizes
        )
        wake, handling, copying = 0.0, 0.0, float("inf")
        if work_seconds > 0:
            repeats = max(1, round(work_seconds / _seconds_of_work(1)))
            handling, large = self._handling_seconds(transport, repeats)
            copying = _MESSAGE_BYTES / max(large - handling, 1e-9)
            gap = self._turn_seconds(transport, torch.zeros(1), repeats) - _seconds_of_work(repeats)
            wake = max(0.0, gap - latency - 2 * handling)
        measured = Link(latency, _LOAD_BYTES / max(loaded - latency, 1e-9), wake, handling, copying)
        return self.share(measured if self.is_main else None)

    def _handling_seconds(self, transport: Transport, repeats: int) -> tuple[float, float]:
        """What a message of 1 byte keeps either end from its work, and one of `_MESSAGE_BYTES`.

        Ranks 0 and 1 work all the time, and give each other a message after every piece of work, which the other announced
        two pieces before, and takes one piece later: what a message takes while both cores are busy is several times what it
        takes by itself. Medians, of sending on the one hand and of announcing and taking on the other; of the rank for which
        that is less, since the one with the faster core waits for the other.
        """
        self.barrier()
        sizes, count, ahead = (1, _MESSAGE_BYTES), 2 * _ROUNDS, 2
        ends: list[tuple[list[float], list[float], list[float]]] = [([], [], []) for _ in sizes]  # send, announce, take
        mine, theirs = ([_probe(source, n) for n in range(count)] for source in (self.rank, 1 - self.rank))
        tensors = [torch.zeros(sizes[n % 2], dtype=torch.uint8) for n in range(count)]
        for n in range(-ahead, count + 1 if self.rank < 2 else -ahead):
            if n + ahead < count:
                buffers, start = [torch.empty_like(tensors[n + ahead])], time.perf_counter()
                transport.post(theirs[n + ahead], buffers)
                ends[n % 2][1].append(time.perf_counter() - start)
            if 0 <= n < count:
                _work(repeats)
                start = time.perf_counter()
                transport.send(mine[n], [tensors[n]])
                ends[n % 2][0].append(time.perf_counter() - start)
            if n > 0:
                start = time.perf_counter()
                _receive(transport, theirs[n - 1])
                ends[(n - 1) % 2][2].append(time.perf_counter() - start)
        if self.rank < 2:
            transport.flush(0)
        self.barrier()
        mine_of_both = [sum(median(seconds or [0.0]) for seconds in size) / 2 for size in ends]
        small, large = min(self.gather([mine_of_both])[:2], default=mine_of_both)
        return small, large

    def _turn_seconds(self, transport: Transport, tensor: Tensor, repeats: int = 0) -> float:
        """Mean seconds of a turn, where ranks 0 and 1 in turn work and give `tensor` to the other."""
        self.barrier()
        start = time.perf_counter()
        for n in range(_ROUNDS if self.rank < 2 else 0):
            for sender in (0, 1):
                if self.rank == sender:
                    _work(repeats)
                    transport.send(_probe(self.rank, n), [tensor])
                else:
                    transport.post(_probe(sender, n), [torch.empty_like(tensor)])
                    _receive(transport, _probe(sender, n))
                if tensor.is_cuda:
                    torch.cuda.synchronize(tensor.device)
        if self.rank < 2:
            transport.flush(0)
        seconds = time.perf_counter() - start
        self.barrier()
        return seconds / (2 * _ROUNDS)


def _probe(source: int, number: int) -> Message:
    """One of the messages that a link is measured with."""
    return Message(Lane.ACTIVATION, Action(Role.STUDENT, source, Op.FORWARD, 0, number), source, 1 - source)


def _receive(transport: Transport, message: Message) -> None:
    transport.arrived(message)
    transport.take(message)


def _work(repeats: int) -> None:
    """Some arithmetic in the caches, such as blocks do."""
    weights = torch.ones(256, 256)
    for _ in range(repeats):
        torch.mm(weights, weights)


def _seconds_of_work(repeats: int) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        _work(repeats)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def join_world(devices: int, device_type: str, timeout_seconds: float, *, spare_ranks: bool = False) -> World:
    """The world that this process is part of: a started process group, torchrun's, or this process alone.

    Raises `ConfigError` when torchrun started another number of processes than `devices`. With `spare_ranks` there may be
    more, of which the first `devices` call this.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_initialized() and launched > 1:
        start_process_group(device_type, timeout_seconds)
    if not dist.is_initialized():
        return OneProcess(devices)
    if spare_ranks and dist.get_rank() < devices < dist.get_world_size():
        return Processes(devices)
    if dist.get_world_size() != devices:
        raise ConfigError(
            f"{dist.get_world_size()} processes were started, but devices is {devices}; "
            f"start as many processes as devices, or pass --devices {dist.get_world_size()}"
        )
    return Processes()


def start_process_group(device_type: str, timeout_seconds: float, **how: Any) -> None:
    """Open the default group: gloo for CPU tensors, and NCCL beside it for CUDA tensors."""
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds), **how)


def choose_device_type(wanted: str | None, devices: int) -> str:
    """`wanted`, or CUDA where there are enough devices, else the CPU; `DeviceError` for what is not there."""
    here = min(devices, int(os.environ.get("LOCAL_WORLD_SIZE", str(devices))))
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted is None:
        return "cuda" if available >= here else "cpu"
    if wanted not in ("cpu", "cuda"):
        raise DeviceError(f"no device type '{wanted}'; expected cpu or cuda")
    if wanted == "cuda" and available < here:
        raise DeviceError(
            f"{here} CUDA devices asked for, this machine has {available}; use --device cpu or fewer devices"
        )
    return wanted


def device_of(rank: int, device_type: str) -> torch.device:
    """The device of a rank on its own machine."""
    if device_type == "cpu":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", str(rank)))
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def in_main_process() -> bool:
    """Whether this process is, or will be, that of rank 0."""
    return dist.get_rank() == 0 if dist.is_initialized() else os.environ.get("RANK", "0") == "0"
