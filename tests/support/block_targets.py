"""What tests of blockwise training run in processes of their own: targets of `launch`, which are pickled by name."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pipestill as ps
from pipestill.losses import cross_entropy
from pipestill.model.blockwise.dry_run import blockwise_dry_run
from pipestill.recipes.blockwise import BlockwiseWorkload, end_to_end
from pipestill.recipes.compress import Compress
from pipestill.recipes.run_options import Numbers, RunOptions
from pipestill.recipes.runner import Runner
from pipestill.recipes.training import Training
from pipestill.runtime.blockwise.measure_all_reduce import measure_allreduces
from pipestill.runtime.transport.message import Message
from pipestill.runtime.transport.process_group import ProcessGroup
from pipestill.runtime.world import Processes
from pipestill.schedule import Action, Lane, Op, Role
from pipestill.schedule.blockwise.profile import BlockProfile
from support.blocks import ROWS, BlockCase, profile_of
from support.targets import note, rank, strike


class Struck(nn.Module):
    """A student block that fails on rank `where` in its `at`-th call with half of a batch."""

    def __init__(self, how: str, where: int, directory: str, at: int = 3) -> None:
        super().__init__()
        self.how, self.where, self.directory, self.at, self.calls = how, where, directory, at, 0
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += len(x) == ROWS // 2  # the samples before the run have fewer rows
        if len(x) == ROWS // 2 and self.calls == self.at and rank() == self.where:
            strike(self.how, self.directory)
        return self.layer(x)


def train_in_a_group(how: str, where: int, directory: str) -> None:
    """Two ranks share the rows of every batch of two blocks, and rank `where` fails in the second."""
    note(directory, f"rank-{rank()}", str(os.getpid()))
    teacher = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    student = nn.Sequential(nn.Linear(4, 4), Struck(how, where, directory))
    trainer = ps.Trainer(
        ps.Blockwise(teacher, student), devices=2, strategy="dp", device="cpu", costs=profile_of(2), timeout_seconds=30.0
    )
    trainer.fit([torch.randn(ROWS, 4) for _ in range(6)])


def allreduces(optimizer: Any = torch.optim.SGD) -> tuple[BlockProfile, list[bool], bool]:
    """What is measured of the blocks of a case, and whether that left the models as they were."""
    case, world = BlockCase("norm", dtype=torch.float32), Processes()
    task = case.task()
    before = {name: t.clone() for name, t in (task.student.state_dict() | task.teacher.state_dict()).items()}
    rows = torch.randn(ROWS, 6)
    contracts = blockwise_dry_run(task, rows)
    measured = measure_allreduces(
        task, contracts, rows if world.is_main else None, replace(profile_of(4), batch=ROWS), world=world,
        optimizer=lambda parameters: optimizer(parameters.values(), lr=0.1), device=torch.device("cpu"),
    )  # fmt: skip
    after = task.student.state_dict() | task.teacher.state_dict()
    same = all(torch.equal(t, after[name]) for name, t in before.items())
    return measured, [p.grad is None for p in task.student.parameters()], same


@dataclass(frozen=True)
class TwoBlocks:
    """A recipe of two small blocks."""

    name = "two-blocks"

    def workload(self, seed: int, num_samples: int | None = None) -> BlockwiseWorkload:
        """Random rows, of which no block can make anything."""
        rows = torch.utils.data.TensorDataset(torch.randn(8 * ROWS, 4), torch.zeros(8 * ROWS, dtype=torch.int64))
        loader: DataLoader[Any] = DataLoader(rows, batch_size=ROWS)
        training = Training(epochs=1, optimizer=torch.optim.SGD, lr=0.01)
        return BlockwiseWorkload(
            self.task, loader, loader, cross_entropy, {}, teacher_training=training, student_training=training,
            alone_training=training,
        )  # fmt: skip

    def task(self) -> ps.Blockwise:
        """Fresh models, the same every time."""
        torch.manual_seed(0)
        return ps.Blockwise(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)))


def settled() -> list[int]:
    """How many sends rank 0 keeps: before it is told that the second arrived, and after."""
    transport, kept = ProcessGroup(30.0), list[int]()
    messages = [Message(Lane.TEACHER, Action(Role.TEACHER, 0, Op.FORWARD, 0, step), 0, 1) for step in range(3)]
    other = Message(Lane.TOKEN, Action(Role.TEACHER, 0, Op.FORWARD, 0, 0), 0, 1)
    if rank() == 0:
        for message in (other, *messages):
            transport.send(message, [torch.ones(2)])
        kept.append(len(transport.under_way[0, False]))
        for _ in range(2):  # the second time there is nothing left to do
            transport.settle(messages[1])
            kept.append(len(transport.under_way[0, False]))
    else:
        for message in (other, *messages):
            transport.post(message, [torch.empty(2)])
    transport.flush(0)
    return kept


def train_teacher(devices: int) -> dict[str, torch.Tensor]:
    """The teacher after one epoch, on the last process: it has two blocks, so at most two processes train it."""
    one = Numbers((1,))
    recipe = Compress(widths=Numbers((4,)), depths=one, student_depths=one, teacher_epochs=1)
    workload = recipe.workload(0, 64)
    task = workload.task()
    options = RunOptions(devices=devices, microbatches=2, timeout_seconds=60.0, device="cpu")
    options = end_to_end(options, task.teacher)
    assert options.devices == min(devices, 2)
    runner = Runner(options, None, quiet=True)
    supervised = ps.Supervised(task.teacher, workload.supervised_loss)
    for _ in range(2):  # a second training has groups of its own
        workload._train_whole("teacher", supervised, workload.teacher_training, options, runner)
    state = {name: tensor.clone() for name, tensor in task.teacher.state_dict().items()}
    box: list[Any] = [state]
    dist.broadcast_object_list(box, src=devices - 1)
    return dict(box[0])
