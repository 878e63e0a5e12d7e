import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.fits import unit_costs
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import pipestill as ps
from pipestill.errors import ConfigError, DataError, ModelError, PlanError
from pipestill.model.blocks import ranges
from pipestill.model.dry_run import dry_run
from pipestill.plan import Plan
from pipestill.runtime.launch import launch
from pipestill.runtime.pipeline.torch_pipelining import train_with_torch

sys.path.append(str(Path(__file__).parents[3]))  # the processes that `launch` starts import this file by its full name

needs_peer = pytest.mark.skipif(torch.__version__ < TorchVersion("2.11"), reason="the peer needs torch 2.11 or newer")
MICROBATCHES = 4
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}


class Swap(nn.Module):
    """(rows, a, b) -> (rows, b, a), not contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Twice(nn.Module):
    """Passes on two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x * 2


def first_cross_entropy(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output[0], target)


def distillation() -> ps.Distillation:
    """Two stages (4 + 3 blocks) meet where the tensor is not contiguous and the next block writes to it."""
    torch.manual_seed(3)
    student = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Unflatten(1, (3, 4)), Swap(),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    teacher = nn.Sequential(nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Linear(16, 5))
    return ps.Distillation(teacher, student, ps.losses.SoftTarget(temperature=2.0, weight=0.5))


def batches(rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(n, 6, generator=generator), torch.randint(5, (n,), generator=generator)) for n in rows]


def optimizer(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters.values(), **OPTIONS)


def plan_of(task: Any, *, ranks: int, microbatches: int = MICROBATCHES) -> Plan:
    partitions = {"student": {1: (7,), 2: (4, 3)}, "teacher": {1: (3,), 2: (1, 2)}}
    return Plan(
        "1f1b", microbatches, partitions["student"][ranks], partitions["teacher"][ranks] if task.teacher_blocks else (),
        unit_costs(task),
    )  # fmt: skip


def train(kind: Any, task: Any, plan: Plan, data: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The student's state after training on this rank; counts how often its blocks run."""
    contracts = dry_run(task, *data[0])
    (blocks,) = [b for rank, b in enumerate(ranges(plan.student_partition)) if rank == dist.get_rank()]
    runs = dict.fromkeys(blocks, 0)

    def count(block: int) -> None:
        runs[block] += 1

    for i in blocks:
        task.student[i].register_forward_hook(lambda module, given, output, i=i: count(i))
    seconds = train_with_torch(task, contracts, plan, data, kind=kind, optimizer=optimizer, seed=0, device=torch.device("cpu"))
    assert len(seconds) == len(data) and all(s > 0 for s in seconds)
    assert set(runs.values()) == {len(data) * plan.microbatches}, f"blocks ran {runs} times"
    return dict(task.student.state_dict())


def train_rank(rows: Sequence[int], uneven: Sequence[int]) -> dict[str, Any]:
    """On one of two ranks: the whole student after both kinds of training, and why `uneven` batches are refused."""
    outcome: dict[str, Any] = {}
    for kind in ("1f1b", "gpipe"):
        task = distillation()
        plan = plan_of(task, ranks=2)
        outcome[kind] = train(kind, task, plan, batches(rows))
        for rank, blocks in enumerate(ranges(plan.student_partition)):
            for tensor in task.student_blocks.tensors_of(blocks).values():
                dist.broadcast(tensor.detach(), src=rank)
    try:
        train("1f1b", distillation(), plan, batches(uneven))
    except DataError as error:
        outcome["refusal"] = str(error)
    return outcome


def trained_by_reference(task: Any, rows: Sequence[int], data: Any = None) -> dict[str, Tensor]:
    trainer = ps.Trainer(
        task, strategy="reference", microbatches=MICROBATCHES, device="cpu",
        lr=OPTIONS["lr"], optimizer_options={"momentum": OPTIONS["momentum"]},
    )  # fmt: skip
    trainer.fit(data or batches(rows))
    return dict(trainer.student.state_dict())


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, Any]:
    outcome: dict[str, Any] = launch(train_rank, ((8, 8, 8), (8, 8, 6)), 2, threads=1, timeout_seconds=60.0)
    return outcome


@needs_peer
@pytest.mark.parametrize("kind", ["1f1b", "gpipe"])
def test_two_ranks_train_like_the_reference(kind: str, two_ranks: dict[str, Any]) -> None:
    assert_equal(two_ranks[kind], trained_by_reference(distillation(), (8, 8, 8)))


@needs_peer
def test_uneven_batch_is_refused_with_its_numbers(two_ranks: dict[str, Any]) -> None:
    for part in ("batch 3 has 6 rows", "the first has 8", "4 microbatches", "drop_last=True"):
        assert part in two_ranks["refusal"]


@needs_peer
@pytest.mark.parametrize("kind", ["1f1b", "gpipe"])
def test_one_rank_trains_like_the_reference(kind: str) -> None:
    task = distillation()
    with one_rank():
        got = train(kind, task, plan_of(task, ranks=1), batches((8, 8)))
    assert_equal(got, trained_by_reference(distillation(), (8, 8)))


@needs_peer
def test_student_without_a_teacher_trains_like_the_reference() -> None:
    def supervised() -> ps.Supervised:
        return ps.Supervised(distillation().student, ps.losses.cross_entropy)

    task = supervised()
    with one_rank():
        got = train("1f1b", task, plan_of(task, ranks=1), batches((8, 8)))
    assert_equal(got, trained_by_reference(supervised(), (8, 8)))


@needs_peer
def test_uneven_labels_count_as_in_the_reference() -> None:
    """Of each batch of 8 rows, whole microbatches have no label."""
    uneven = batches((8, 8))
    for _, labels in uneven:
        labels[:3] = -100
    task = distillation()
    with one_rank():
        got = train("1f1b", task, plan_of(task, ranks=1), uneven)
    assert_equal(got, trained_by_reference(distillation(), (8, 8), uneven))


@needs_peer
def test_a_loss_of_the_whole_batch_is_refused() -> None:
    task = dataclasses.replace(distillation(), batch_loss=True)
    with one_rank(), pytest.raises(PlanError, match="losses of the outputs of a microbatch"):
        train("1f1b", task, dataclasses.replace(plan_of(task, ranks=1), demands=task.demands), batches((8,)))


@needs_peer
@pytest.mark.parametrize("rows", [(8, 4), (10, 10)])
def test_batches_that_do_not_divide_alike_are_refused(rows: Sequence[int]) -> None:
    task = distillation()
    with one_rank(), pytest.raises(DataError, match="drop_last"):
        train("gpipe", task, plan_of(task, ranks=1), batches(rows))


@needs_peer
def test_boundary_of_two_tensors_is_refused() -> None:
    task = ps.Supervised(nn.Sequential(nn.Linear(6, 5), Twice()), first_cross_entropy)
    plan = Plan("1f1b", MICROBATCHES, (2,), (), unit_costs(task))
    with one_rank(), pytest.raises(ModelError, match=r"after student block 1 \('1'\)"):
        train("1f1b", task, plan, batches((8,)))


@needs_peer
def test_plan_for_another_number_of_processes_is_refused() -> None:
    task = distillation()
    with one_rank(), pytest.raises(PlanError, match="2 stages, but 1 processes"):
        train("1f1b", task, plan_of(task, ranks=2), batches((8,)))


def test_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1"))
    task = distillation()
    with one_rank(), pytest.raises(ConfigError, match=r"needs torch 2.11 or newer, this is 2\.9\.1"):
        train("1f1b", task, plan_of(task, ranks=1), batches((8,)))
