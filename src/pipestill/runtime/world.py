"""The ranks of a run as a whole: all in this process, or one in each process of a group.

Processes find out here which of them are on one machine, and are connected by sockets.
"""

import os
import secrets
import socket
import struct
import sys
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipestill.errors import ConfigError, DeviceError
from pipestill.runtime.transport.message import Message
from pipestill.runtime.transport.process_group import ProcessGroup
from pipestill.runtime.transport.protocol import InProcess, Transport, Waiting, World
from pipestill.runtime.transport.shared_memory import SharedMemory
from pipestill.schedule import Lane

T = TypeVar("T")

_RANK = struct.Struct("<q")


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
                if rank in waits and waits[rank] not in self._boxes:
                    continue
                moved = True
                try:
                    waits[rank] = next(run)
                except StopIteration:
                    del alive[rank]
            if not moved:
                stuck = "; ".join(f"rank {rank} waits for {waits[rank]}" for rank in alive)
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
        return bool(dist.distributed_c10d._get_default_store().add(f"pipestill-{name}", 1) == 1)


def may_share_memory() -> bool:
    """Whether this process may share memory: on Linux, unless PIPESTILL_SHARED_MEMORY is 0."""
    able = sys.platform == "linux" and hasattr(os, "memfd_create")  # Pythons for an old C library lack it
    return able and os.environ.get("PIPESTILL_SHARED_MEMORY", "1") != "0"


def connect_peers(ranks: Sequence[int], group: dist.ProcessGroup | None, timeout_seconds: float) -> dict[int, socket.socket]:
    """Connect to each of the other `ranks` that is on this machine, in the same network namespace, and may share memory.

    All ranks call this together, also those that may not. They exchange nothing but random names of sockets in the abstract
    namespace, which only processes of one machine can connect to; the names vanish with the sockets, however a process ends.
    """
    here, name = dist.get_rank(), b"\0pipestill-" + secrets.token_hex(16).encode()
    found: dict[int, socket.socket] = {}
    if not may_share_memory():
        for nothing in (b"", list[int]()):
            _gathered(nothing, len(ranks), group)
        return found
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(name)
        listener.listen(len(ranks))
        listener.settimeout(timeout_seconds)
        for rank, theirs in zip(ranks, _gathered(name, len(ranks), group), strict=True):
            client = _connect(theirs) if rank < here and theirs else None
            if client is not None:
                client.send(_RANK.pack(here))
                found[rank] = client
        callers = sum(here in called for called in _gathered(sorted(found), len(ranks), group))
        while callers:
            accepted, _ = listener.accept()
            if not _same_user(accepted):
                accepted.close()
                continue
            accepted.settimeout(timeout_seconds)
            (caller,) = _RANK.unpack(accepted.recv(_RANK.size))
            found[caller] = accepted
            callers -= 1
    return found


def _connect(name: bytes) -> socket.socket | None:
    """Connect to socket `name`; None where its rank is on another machine or belongs to another user."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        client.connect(name)
        if _same_user(client):
            return client
    except OSError:
        pass
    client.close()
    return None


def _same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end belongs to this user: every user of the machine can see abstract names."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(user == os.getuid())


def _gathered(value: T, count: int, group: dist.ProcessGroup | None) -> list[T]:
    """The values of all ranks, on all of them."""
    box: list[Any] = [None] * count
    dist.all_gather_object(box, value, group=group)
    return box


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
        raise DeviceError(f"{here} CUDA devices asked for, this machine has {available}; use --device cpu or fewer devices")
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
