"""Measures the link between ranks: how long messages take, and how much they disturb work.

A link is what two ranks exchange messages over. Its costs (`pipestill.costs.Link`) are a latency and a bandwidth and, on CPUs,
what a message takes away from the work of both ranks: handling it, copying it, and waking up for it.
"""

import time
from statistics import median

import torch
from torch import Tensor

from pipestill.costs import Link
from pipestill.model.contracts import FEW, MORE, TensorForm
from pipestill.runtime.transport.message import Message
from pipestill.runtime.transport.protocol import Transport, World
from pipestill.schedule import Action, Lane, Op, Role

_LOAD_BYTES = 4_000_000
_MESSAGE_BYTES = 500_000
_ROWS = 10
_ROUNDS = 30
_DEADLINE_SECONDS = 60.0


def measure_link(world: World, work_seconds: float, device: torch.device) -> Link:
    """Measure the link between ranks 0 and 1, for tensors on `device`. All ranks call this together.

    It costs nothing where all ranks share a process. Latency and bandwidth come from round trips of 1 byte and of `_LOAD_BYTES`.
    On CPUs, `work_seconds` is how long an action of the run lasts (0: work is done elsewhere). Ranks that take turns at such
    work show how long one needs to wake up; ranks that both work, with messages in between, show how much these disturb it.
    """
    if len(world.ranks) == world.num_ranks:
        return Link()
    (rank,) = world.ranks
    return _Probe(world, rank).link(work_seconds, device)


class _Probe:
    """Exchanges messages between ranks 0 and 1; the others only wait."""

    def __init__(self, world: World, rank: int) -> None:
        self.world = world
        self.rank = rank
        self.takes_part = rank < 2
        self.transport = world.transport(rank, (), _DEADLINE_SECONDS)

    def link(self, work_seconds: float, device: torch.device) -> Link:
        sizes = (1, 1, _LOAD_BYTES)  # the first transfer connects
        _, latency, loaded = (self._turn_seconds(torch.zeros(size, dtype=torch.uint8, device=device)) for size in sizes)
        wake, handling, copying = 0.0, 0.0, float("inf")
        if work_seconds > 0:
            repeats = max(1, round(work_seconds / _seconds_of_work(1)))
            handling, large = self._handling_seconds(repeats)
            copying = _MESSAGE_BYTES / max(large - handling, 1e-9)
            gap = self._turn_seconds(torch.zeros(1), repeats) - _seconds_of_work(repeats)
            wake = max(0.0, gap - latency - 2 * handling)
        measured = Link(latency, _LOAD_BYTES / max(loaded - latency, 1e-9), wake, handling, copying)
        return self.world.broadcast(measured if self.world.is_main else None)

    def _handling_seconds(self, repeats: int) -> tuple[float, float]:
        """Seconds that a message takes away from the work of either end: for a few bytes, and for `_MESSAGE_BYTES`.

        Ranks 0 and 1 work all the time and send each other a message after every piece of work. The receiver announces it two
        pieces before and takes it one piece later: a message costs several times more while both cores are busy. The figures
        are medians of packing and sending, and of announcing, taking and unpacking. They are those of the rank for which they
        are less, since the rank with the faster core also waits for the other.
        """
        self.world.barrier()
        count, ahead, device = 2 * _ROUNDS, 2, torch.device("cpu")
        ends: list[tuple[list[float], list[float], list[float]]] = [([], [], []), ([], [], [])]  # send, announce, take
        mine, theirs = ([_message(source, n) for n in range(count)] for source in (self.rank, 1 - self.rank))
        tensors = [torch.zeros(_ROWS, size // _ROWS, dtype=torch.uint8) for size in (_ROWS, _MESSAGE_BYTES)]
        forms = [TensorForm.between(tensor[:FEW].clone(), tensor[:MORE].clone()) for tensor in tensors]
        for n in range(-ahead, count + 1 if self.takes_part else -ahead):
            if n + ahead < count:
                start = time.perf_counter()
                self.transport.post(theirs[n + ahead], [forms[n % 2].empty(_ROWS, device)])
                ends[n % 2][1].append(time.perf_counter() - start)
            if 0 <= n < count:
                _work(repeats)
                start = time.perf_counter()
                self.transport.send(mine[n], [forms[n % 2].pack(tensors[n % 2], _ROWS)])
                ends[n % 2][0].append(time.perf_counter() - start)
            if n > 0:
                start = time.perf_counter()
                (packed,) = _receive(self.transport, theirs[n - 1])
                forms[(n - 1) % 2].unpack(packed, _ROWS)
                ends[(n - 1) % 2][2].append(time.perf_counter() - start)
        if self.takes_part:
            self.transport.flush(0)
        self.world.barrier()
        mine_of_both = [sum(median(seconds or [0.0]) for seconds in size) / 2 for size in ends]
        small, large = min(self.world.gather([mine_of_both])[:2], default=mine_of_both)
        return small, large

    def _turn_seconds(self, tensor: Tensor, repeats: int = 0) -> float:
        """Mean seconds of a turn, in which one of ranks 0 and 1 works and then sends `tensor` to the other."""
        self.world.barrier()
        start = time.perf_counter()
        for n in range(_ROUNDS if self.takes_part else 0):
            for sender in (0, 1):
                if self.rank == sender:
                    _work(repeats)
                    self.transport.send(_message(self.rank, n), [tensor])
                else:
                    self.transport.post(_message(sender, n), [torch.empty_like(tensor)])
                    _receive(self.transport, _message(sender, n))
                if tensor.is_cuda:
                    torch.cuda.synchronize(tensor.device)
        if self.takes_part:
            self.transport.flush(0)
        seconds = time.perf_counter() - start
        self.world.barrier()
        return seconds / (2 * _ROUNDS)


def _message(source: int, number: int) -> Message:
    """Message number `number` from one of the two ranks to the other."""
    return Message(Lane.ACTIVATION, Action(Role.STUDENT, source, Op.FORWARD, 0, number), source, 1 - source)


def _receive(transport: Transport, message: Message) -> list[Tensor]:
    transport.arrived(message)
    return transport.take(message)


def _work(repeats: int) -> None:
    """Compute something that fills a core's own caches, as blocks do."""
    inputs, weights = torch.ones(16, 1024), torch.ones(1024, 1024)
    for _ in range(repeats):
        torch.mm(inputs, weights)


def _seconds_of_work(repeats: int) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        _work(repeats)
        seconds.append(time.perf_counter() - start)
    return median(seconds)
