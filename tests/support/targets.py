"""What tests run in processes of their own: targets of `launch`, which are pickled by name."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pipestill as ps
from pipestill.errors import DataError, ModelError
from pipestill.runtime.transport.message import Message
from pipestill.runtime.transport.process_group import ProcessGroup
from pipestill.runtime.transport.shared_memory import SharedMemory
from pipestill.runtime.world import Processes
from pipestill.schedule import Action, Lane
from support.fits import unit_costs
from support.models import CLASSES, vectors


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else -1


def note(directory: str, name: str, text: str = "") -> None:
    """Leave a file for the test to read, whole or not at all."""
    partial = Path(directory, f".{name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(Path(directory, name))


# ---------------------------------------------------------------- runs that fail


def strike(how: str, directory: str) -> None:
    """Fail in the way `how`, and note when."""
    note(directory, "struck", str(time.monotonic()))
    if how == "raise":
        raise ZeroDivisionError("struck")
    if how == "user error":
        raise ModelError("struck by the user")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "hang":
        threading.Event().wait()
    if how == "exit":
        os._exit(3)
    if how == "sys.exit":
        sys.exit(3)


ROWS = 4


class Striker(nn.Module):
    """A block that fails in the `at`-th forward of a microbatch on rank `where`."""

    def __init__(self, how: str, where: int, directory: str, at: int = 2) -> None:
        super().__init__()
        self.how, self.where, self.directory, self.at, self.calls = how, where, directory, at, 0
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += len(x) == ROWS  # the sample before the run has fewer
        if len(x) == ROWS and self.calls == self.at and rank() == self.where:
            if self.how == "grow":
                return torch.cat([self.layer(x), x], 1)
            if self.how == "nan":
                return self.layer(x) * float("nan")
            strike(self.how, self.directory)
        return self.layer(x)


class Loader:
    """A loader that fails, on rank 0, at its third batch."""

    def __init__(self, how: str | None, directory: str) -> None:
        self.how, self.directory = how, directory

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i, batch in enumerate(vectors((3 * ROWS,) * 6)):
            if i == 3 and self.how is not None:
                if self.how == "no rows":
                    yield batch[0][:0], batch[1][:0]
                strike(self.how, self.directory)
            yield batch


def train(place: str, how: str, where: int, directory: str, devices: int, timeout_seconds: float = 30.0) -> float:
    """Train on `devices` ranks, of which rank `where` fails in `place`: its block, the loss, or the loader."""
    note(directory, f"rank-{rank()}", str(os.getpid()))
    blocks: list[nn.Module] = [Striker(how if place == "block" else "", where, directory) for _ in range(devices)]
    blocks[-1] = nn.Sequential(blocks[-1], nn.Linear(4, CLASSES))
    calls = [0]

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Any:
        calls[0] += len(student) == ROWS
        if place == "loss" and calls[0] == 4:
            if how == "nan":
                return {"soft_target": student.sum().abs() * float("inf"), "cross_entropy": student.sum() * float("nan")}
            if how == "parts":
                return {"soft_target": (student - teacher).sum(), "another": student.sum()}
            strike(how, directory)
        return ps.losses.SoftTarget()(student, teacher, target)

    torch.manual_seed(3)
    teacher = nn.Sequential(*(nn.Linear(4, 4) for _ in range(devices - 1)), nn.Linear(4, CLASSES))
    student = nn.Sequential(*blocks[:-1], *blocks[-1])
    partition = (1,) * (devices - 1) + (2,)
    task = ps.Distillation(teacher, student, loss)
    trainer = ps.Trainer(
        task, devices=devices, microbatches=3, costs=unit_costs(task), student_partition=partition, device="cpu",
        timeout_seconds=timeout_seconds,
    )  # fmt: skip
    loader = Loader(how if place == "loader" else None, directory)
    return trainer.fit(loader, epochs=2).metrics["loss"]


def strike_in_a_collective(how: str, where: int, directory: str) -> None:
    """Fail while the others are in a barrier, where no message of ours is under way."""
    note(directory, f"rank-{rank()}", str(os.getpid()))
    dist.barrier()
    if rank() == where:
        strike(how, directory)
    dist.barrier()


# ---------------------------------------------------------------- small ones


def who(prefix: str) -> tuple[str, int, int, str, str]:
    return prefix, rank(), torch.get_num_threads(), os.environ["LOCAL_RANK"], str(dist.get_backend())


def give(value: Any) -> Any:
    return value if rank() == 0 else "never seen"


def unpicklable() -> Any:
    return lambda: None


def raise_on(where: int, error: BaseException) -> None:
    if rank() == where:
        raise error


def raise_data_error_everywhere() -> None:
    raise DataError(f"no rows for rank {rank()}")


# ---------------------------------------------------------------- messages between two ranks

TYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.complex64,
]  # fmt: skip


def message(text: str, lane: Lane = Lane.ACTIVATION, segment: int = 0, source: int = 0, destination: int = 1) -> Message:
    return Message(lane, Action.parse(text), source, destination, segment)


Over = Callable[[float], ProcessGroup | SharedMemory]


def gloo(timeout_seconds: float) -> ProcessGroup:
    return ProcessGroup(timeout_seconds)


def memory(timeout_seconds: float) -> SharedMemory:
    """On both ranks together."""
    transport = Processes().transport(rank(), (), timeout_seconds)
    assert isinstance(transport, SharedMemory)
    assert list(transport.peers) == [1 - rank()]
    _OPEN.append(transport)  # a rank that only looks on is there still
    return transport


_OPEN: list[SharedMemory] = []


def under_way(group: ProcessGroup | SharedMemory) -> int:
    """Sends that may not have been announced by their receivers."""
    if isinstance(group, ProcessGroup):
        return sum(map(len, group.under_way.values()))
    return sum(len(queue) for peer in group.peers.values() for queue in peer.unannounced.values())


def exchange(over: Over) -> str:
    """Every type, shapes without numbers or axes, messages taken in another order than they were sent in."""
    group = over(20.0)
    sent = {
        message("S0F0@0"): [torch.arange(6).view(2, 3).to(dtype) for dtype in TYPES],
        message("S0F1@0"): [torch.tensor(1.5), torch.zeros(0, 3), torch.ones(1)],
        message("T0F1@0", Lane.TEACHER): [torch.full((5000,), 2.0)],
        message("S0F1@0", Lane.TOKEN): [torch.full((1,), 3.0)],
        message("S0F1@0", segment=1): [torch.full((7,), 4.0)],
        message("S0F1@1"): [torch.full((9,), 5.0)],
        message("S0F2@1"): [torch.full((2,), float(i)) for i in range(40)],
    }
    if rank() == 0:
        for one, tensors in sent.items():
            group.send(one, tensors)
        group.flush(1)
        group.flush(0)
        assert not under_way(group)
    else:
        order = list(sent)
        for one in order[::-1]:
            group.post(one, [torch.empty_like(t) for t in sent[one]])
        for one in order[::2] + order[1::2]:
            assert group.arrived(one)
            for got, expected in zip(group.take(one), sent[one], strict=True):
                assert got.dtype == expected.dtype
                assert torch.equal(got, expected)
        assert not group.posted
    return "done"


def both_send_first(over: Over, count: int = 300) -> str:
    """More messages each way than are kept under way, all sent before any is waited for."""
    group, other = over(20.0), 1 - rank()
    for step in range(count):
        group.post(message(f"S0F0@{step}", source=other, destination=rank()), [torch.empty(10)])
    for step in range(count):
        group.send(message(f"S0F0@{step}", source=rank(), destination=other), [torch.full((10,), float(step))])
    for step in range(count):
        one = message(f"S0F0@{step}", source=other, destination=rank())
        assert group.arrived(one)
        assert group.take(one)[0].eq(step).all()
    group.flush(0)
    return "done"


def announced_after_the_schedule(over: Over, count: int = 300) -> str:
    """Targets of a later step, sent first and announced only once the rest of a step has come."""
    group = over(20.0)
    targets = message("S0D@1", Lane.TARGET)
    steps = [message(f"S0F{m}@0") for m in range(count)]
    if rank() == 0:
        for one in (targets, *steps):
            group.send(one, [torch.ones(10)])
        assert under_way(group) < 100  # what has arrived is let go of
        group.flush(0)
    else:
        for one in steps:
            group.post(one, [torch.empty(10)])
        for one in steps:
            assert group.arrived(one)
        group.post(targets, [torch.empty(10)])
        group.flush(0)  # waits for what has been announced, too
        assert group.arrived(targets)
        assert group.take(targets)[0].eq(1.0).all()
    return "done"


def never_sent(over: Over) -> None:
    group = over(0.5)
    if rank() == 0:
        one = message("S1B2@7", Lane.GRADIENT, source=1, destination=0)
        group.post(one, [torch.empty(3)])
        group.arrived(one)


def never_taken(over: Over) -> None:
    group = over(0.5)
    if rank() == 0:
        group.send(message("S0F2@7"), [torch.empty(3)])
        group.flush(0)


def never_posted(over: Over) -> None:
    group = over(0.5)
    if rank() == 0:
        group.arrived(message("S0F2@7", source=1, destination=0))


def other_sizes() -> None:
    """More bytes than were announced."""
    group = memory(20.0)
    one = message("S0F2@7")
    if rank() == 0:
        group.send(one, [torch.empty(3, 300)])
    else:
        group.post(one, [torch.empty(2, 300)])
        group.arrived(one)


def waits_for_who_has_ended() -> None:
    """A message that had been sent is still taken, then nothing more comes."""
    group = memory(20.0)
    first, second = (message(f"S0F{m}@0", source=1, destination=0) for m in range(2))
    if rank() == 0:
        for one in (first, second):
            group.post(one, [torch.empty(2000)])
        group.arrived(first)
        assert group.take(first)[0].eq(7.0).all()
        group.arrived(second)
    else:
        group.send(first, [torch.full((2000,), 7.0)])
        for peer in group.peers.values():
            peer.connection.close()


def meets_with_much_under_way(count: int = 150) -> float:
    """All that rank 1 has announced is sent before both meet, whatever its sizes, though rank 1 takes in nothing meanwhile."""
    group = memory(5.0)
    sent = {message(f"S0F{m}@0"): torch.full((10 if m % 2 else 5000,), float(m)) for m in range(count)}
    met = torch.zeros(1)
    if rank() == 0:
        for one, tensor in sent.items():
            group.send(one, [tensor])
        dist.all_reduce(met)
    else:
        for one, tensor in sent.items():
            group.post(one, [torch.empty_like(tensor)])
        dist.all_reduce(met)
        for one, tensor in sent.items():
            assert group.arrived(one)
            assert torch.equal(group.take(one)[0], tensor)
    group.flush(0)
    return float(met)


def one_of_three_without_memory() -> list[Any]:
    """Everybody to everybody, where one rank is far -> with whom each shares memory, and over what tensors travel."""
    os.environ["PIPESTILL_SHARED_MEMORY"] = str(int(rank() != 2))
    world = Processes()
    group = world.transport(rank(), (), 5.0)
    assert isinstance(group, SharedMemory)
    others = [other for other in range(3) if other != rank()]
    for step in range(60):
        for other in others:
            group.post(message(f"S0F0@{step}", source=other, destination=rank()), [torch.empty(1000)])
        for other in others:
            there = message(f"S0F0@{step}", source=rank(), destination=other)
            group.send(there, [torch.full((1000,), float(100 * rank() + step))])
        for other in others[:: 1 if step % 2 else -1]:
            here = message(f"S0F0@{step}", source=other, destination=rank())
            assert group.arrived(here)
            assert group.take(here)[0].eq(100 * other + step).all()
    group.flush(0)
    told: list[Any] = [None] * 3
    dist.all_gather_object(told, (sorted(group.peers), world.backend("cpu")))
    return told


def reuses_memory(rounds: int = 100) -> tuple[int, int]:
    """Messages of two sizes to and fro -> slots that rank 0 made of each size."""
    group, other = memory(20.0), 1 - rank()
    for step in range(rounds):
        count = 2000 if step % 2 else 5000
        there = message(f"S0F0@{step}", source=0, destination=1)
        back = message(f"S0F0@{step}", source=1, destination=0)
        mine, theirs = (there, back) if rank() == 0 else (back, there)
        group.post(theirs, [torch.empty(count)])
        group.send(mine, [torch.full((count,), float(step))])
        assert group.arrived(theirs)
        assert group.take(theirs)[0].eq(step).all()
    group.flush(0)
    free = group.peers[other].free
    return tuple(len(free[size]) for size in sorted(free))


# ---------------------------------------------------------------- the trainer among processes


def train_from_other_weights(width: int = 4) -> list[Any]:
    """As a script does that seeds nothing, or builds another model, in every process."""
    torch.manual_seed(rank())
    hidden = width if rank() else 4
    student = nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, CLASSES))
    teacher = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, CLASSES))
    task = ps.Distillation(teacher, student, ps.losses.SoftTarget())
    ps.Trainer(task, devices=dist.get_world_size(), microbatches=2, device="cpu").fit(vectors())
    return [t.tolist() for t in student.state_dict().values()]


def train_with_loader(devices: int) -> dict[str, Any]:
    """The first lines of a training script; what every rank sees is gathered on rank 0."""
    task = ps.Supervised(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, CLASSES)), ps.losses.cross_entropy)
    result = ps.Trainer(task, devices=devices, microbatches=2, device="cpu").fit(vectors(), epochs=2)
    state = [t.tolist() for t in task.student.state_dict().values()]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return {"result": result, "states": states}
