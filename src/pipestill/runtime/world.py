"""The ranks of a run as a whole: all in this process, or one in each process of a group."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipestill.errors import ConfigError, DeviceError
from pipestill.runtime.transport.process_group import ProcessGroup
from pipestill.runtime.transport.protocol import InProcess, Message, Transport, Waiting, World
from pipestill.runtime.transport.same_machine import connect_peers
from pipestill.runtime.transport.shared_memory import SharedMemory
from pipestill.schedule import Lane

T = TypeVar("T")


class OneProcess:
    """All ranks in this process, where they take turns."""

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
        """Resume each generator in turn until it waits; the schedule is proved, so some rank can always go on."""
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

    def broadcast(self, value: T | None, rank: int = 0) -> T:
        assert value is not None
        return value

    def gather(self, values: Sequence[T]) -> list[T]:
        return list(values)

    def copy_from(self, tensors: Sequence[Tensor], rank: int) -> None:
        """Do nothing: all ranks have the same tensors."""

    def barrier(self) -> None:
        """Do nothing: there is no other process."""

    def claim(self, name: str) -> bool:
        first = name not in self._claimed
        self._claimed.add(name)
        return first


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
        self.num_sharing_memory = 0
        """How many other ranks share memory with this one."""

    def transport(self, rank: int, edges: Iterable[tuple[int, int, Lane]], timeout_seconds: float) -> Transport:
        lanes = ProcessGroup(timeout_seconds, edges, among_some=self.group is not None)
        if "nccl" in str(dist.get_backend_config()):
            return lanes
        peers = connect_peers(range(self.num_ranks), self.group, timeout_seconds)
        self.num_sharing_memory = len(peers)
        return SharedMemory(timeout_seconds, peers, lanes)

    def backend(self, device_type: str) -> str:
        if device_type != "cpu":
            return "nccl"
        if not self.num_sharing_memory:
            return "gloo"
        return "shared memory" if self.num_sharing_memory == self.num_ranks - 1 else "shared memory and gloo"

    def drive(self, runs: Sequence[Waiting]) -> None:
        for run in runs:
            for message in run:
                raise AssertionError(f"the transport of a process waits itself, but it did not wait for {message}")

    def broadcast(self, value: T | None, rank: int = 0) -> T:
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


def join_world(devices: int, device_type: str, timeout_seconds: float) -> World:
    """The world that this process is part of: a started process group, torchrun's, or this process alone.

    Raises `ConfigError` when torchrun started another number of processes than `devices`.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_initialized() and launched > 1:
        start_process_group(device_type, timeout_seconds)
    if not dist.is_initialized():
        return OneProcess(devices)
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
