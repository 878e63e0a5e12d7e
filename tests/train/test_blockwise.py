"""Blockwise training: every strategy gives what training each block by a plain loop gives."""

import math
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.blocks import BATCHES, EPOCHS, OPTIMIZERS, ROWS, BlockCase, Chain, Outcome, profile_of, run_all
from support.pairwise import every_other
from torch import Tensor, nn

import pipestill as ps
from pipestill.errors import TrainingError
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES, Phase
from pipestill.runtime.blockwise.rank import BlockwiseRank
from pipestill.schedule.blockwise.structure import BlockwiseStructure

KINDS = ("plain", "norm", "thin", "frozen", "library")


@cache
def reference(case: BlockCase) -> Outcome:
    return case.run("reference", 1)


def assert_same(got: Outcome, expected: Outcome) -> None:
    assert got.student.keys() == expected.student.keys()
    different = [name for name, t in expected.student.items() if not torch.equal(t, got.student[name])]
    assert not different


def assert_close(got: Outcome, expected: Outcome) -> None:
    """Sums of rows in another order, and nothing else."""
    for name, tensor in expected.student.items():
        torch.testing.assert_close(got.student[name], tensor, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def splits_rows(outcome: Outcome) -> bool:
    return outcome.result.summary()["exact"] is not True


def moves(outcome: Outcome) -> bool:
    """Whether a block goes from one rank to another."""
    assert outcome.result.plan is not None
    structures = [phase.schedule.structure for phase in outcome.result.plan.phases]
    return any(isinstance(s, BlockwiseStructure) and s.moves for s in structures)


def strategies_by_devices() -> Iterator[Any]:
    """Every strategy on 4 devices, of which each has a block, and on one other number; the rest are slow."""
    for number, strategy in enumerate(BLOCKWISE_STRATEGIES):
        for place, devices in enumerate((1, 2, 3, 6)):
            yield pytest.param(strategy, devices, marks=() if (number + place) % 4 == 1 else pytest.mark.slow)
        yield strategy, 4


@pytest.mark.parametrize(("strategy", "devices"), list(strategies_by_devices()))
def test_every_strategy_trains_like_each_block_alone(strategy: str, devices: int) -> None:
    case = BlockCase()
    got, expected = case.run(strategy, devices), reference(case)
    (assert_close if splits_rows(got) else assert_same)(got, expected)
    if strategy in ("dp", "ls", "relay", "relay-dpu"):
        assert splits_rows(got) == (strategy == "dp" and devices > 1)
    assert all(torch.equal(t, got.teacher[name]) for name, t in case.task().teacher.state_dict().items())
    assert (got.result.steps, got.result.samples) == (EPOCHS * (BATCHES + 1), EPOCHS * (ROWS * BATCHES + 5))


WINDOWS = ((2, 2), (3, 4), (2, 16))
"""Devices, and batches of a window."""


@pytest.mark.parametrize(
    ("kind", "optimizer", "devices", "window"),
    every_other(
        (kind, optimizer, *WINDOWS[(i + j) % len(WINDOWS)])
        for i, kind in enumerate(KINDS)
        for j, optimizer in enumerate(OPTIMIZERS)
    ),
)
def test_blocks_that_move_stay_exact(
    kind: str, optimizer: str, devices: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, buffers, projectors, candidates and what optimizers remember go along, also where an epoch ends in a window."""
    case = BlockCase(kind, optimizer)
    monkeypatch.setattr("pipestill.plan.blockwise.balanced._WINDOWS", (window,))
    got = case.run("balanced", devices, costs=profile_of(4, growth=3 - devices))
    assert moves(got) and not splits_rows(got)
    assert_same(got, reference(case))


@pytest.mark.parametrize(
    ("kind", "strategy", "devices"),
    [("plain", "dp", 7), ("plain", "hybrid", 3), ("thin", "dp", 4), ("frozen", "hybrid", 3), ("library", "dp", 4)],
)
def test_rows_that_are_shared_add_up(kind: str, strategy: str, devices: int) -> None:
    """More ranks than rows in the last batch too."""
    case = BlockCase(kind, "adamw")
    costs = profile_of(4, 1e-5) if strategy == "hybrid" else profile_of(4)
    assert_close(case.run(strategy, devices, costs=costs), reference(case))


def test_statistics_of_shares_are_those_of_their_rows() -> None:
    """So batch norm is exact only where batches stay whole: said in the summary."""
    case = BlockCase("norm")
    assert case.run("relay-dpu", 4).result.summary()["exact"] is True
    assert case.run("dp", 2).result.summary()["exact"] == "rows of a batch are split over ranks"


IN_PROCESSES = [
    (BlockCase("plain", "adamw"), "dp", 2),
    (BlockCase("plain", "adamw"), "relay", 2),
    (BlockCase("norm", "adamw"), "balanced", 2),
    (BlockCase("plain", "adamw"), "ls", 3),
    (BlockCase("plain", "adamw"), "hybrid", 3),
    (BlockCase("plain", "adamw"), "balanced", 3),
    (BlockCase("library", "sgd"), "dp", 3),
]
"""What is trained by which strategy in how many processes."""


@cache
def in_processes(devices: int) -> dict[tuple[BlockCase, str], Outcome]:
    """All that so many processes train, one run after the other in the same group."""
    runs = [(case, strategy) for case, strategy, count in IN_PROCESSES if count == devices]
    return dict(zip(runs, ps.launch(run_all, (runs, devices), devices, threads=1, timeout_seconds=60.0), strict=True))


@pytest.mark.parametrize(("case", "strategy", "devices"), every_other(IN_PROCESSES))
def test_processes_train_like_each_block_alone(case: BlockCase, strategy: str, devices: int) -> None:
    """Also where a group is uneven, and where a block moves with its buffers.

    Among 16 batches of a window and 6 of an epoch, some windows end before the block has moved back.
    """
    got = in_processes(devices)[case, strategy]
    (assert_close if splits_rows(got) else assert_same)(got, reference(case))
    assert len(got.result.peak_memory_bytes) == devices
    assert not any(map(math.isnan, got.result.losses.values()))
    assert moves(got) or case.kind != "norm"


def test_single_precision_is_within_its_own_rounding() -> None:
    case = BlockCase(dtype=torch.float32)
    got = case.run("dp", 3)
    for name, tensor in reference(case).student.items():
        torch.testing.assert_close(got.student[name], tensor, rtol=1e-4, atol=1e-5)


def test_rank_without_tasks_left_takes_over_those_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile says that the last block takes as long as all others together, and that is not so."""
    taken: list[tuple[int, int]] = []
    run_phase = BlockwiseRank._phase

    def noted(self: BlockwiseRank, number: int, phase: Phase) -> Any:
        taken.append((self.rank, number))
        return run_phase(self, number, phase)

    monkeypatch.setattr(BlockwiseRank, "_phase", noted)
    case = BlockCase("norm")
    got = case.run("ls", 2, costs=profile_of(4, growth=10))
    assert got.result.plan is not None
    owners = [phase.ranks[0] for phase in got.result.plan.phases]
    assert sorted(number for _, number in taken) == [0, 1, 2, 3]
    assert [rank for rank, number in taken if rank != owners[number]]
    assert_same(got, reference(case))


def test_steps_end_in_the_middle_of_a_window() -> None:
    case = BlockCase("norm", "adamw")
    expected = case.run("reference", 1, steps=8)
    got = case.run("balanced", 2, steps=8)
    assert moves(got)
    assert got.result.steps == 8
    assert_same(got, expected)


def test_student_that_is_its_teacher_has_no_loss() -> None:
    def model() -> Chain:
        torch.manual_seed(3)
        return Chain([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)])

    task = ps.Blockwise(model(), model())
    result = ps.Trainer(task, lr=0.0, devices=2, strategy="relay", costs=profile_of(3)).fit([torch.randn(8, 6)])
    assert result.losses == {"b0": 0.0, "b1": 0.0, "b2": 0.0}


def test_profile_is_measured_where_none_is_given() -> None:
    got = BlockCase().run("hybrid", 2, costs=None, epochs=1)
    assert got.result.plan is not None
    profile = got.result.plan.costs.profile
    assert [block.rows for block in profile.blocks] == [(6, 12)] * 4
    assert profile.memory_known
    assert profile.blocks[1].input_bytes_per_row == 8 * 8  # eight numbers of eight bytes
    assert profile.blocks[1].parameter_bytes == (8 * 8 + 8) * 8
    assert profile.blocks[1].state_bytes == 3 * (8 * 8 + 8) * 8  # weights, gradients, momentum
    assert profile.blocks[1].activation_bytes_per_row > 0


def test_nest_crosses_between_blocks() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift = nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            x = x if isinstance(x, dict) else {"a": x, "b": x * 2, "n": 3}
            return {"a": self.lift(x["a"]), "b": x["b"] + x["a"], "n": 3}

    def loss(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        return ps.losses.mse(student["a"], teacher["a"]) + ps.losses.mse(student["b"], teacher["b"])

    def trained(strategy: str, devices: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        task = ps.Blockwise(Chain([Pair() for _ in range(3)]).double(), Chain([Pair() for _ in range(3)]).double(), loss=loss)
        data = [torch.randn(rows, 4, dtype=torch.float64) for rows in (6, 6, 5)]
        trainer = ps.Trainer(task, devices=devices, strategy=strategy, costs=profile_of(3, 1e-5), lr=0.05)
        trainer.fit(data, epochs=3)
        return task.student.state_dict()

    torch.manual_seed(7)
    expected = trained("reference", 1)
    for strategy, devices in (("relay-dpu", 3), ("hybrid", 4), ("dp", 2)):
        torch.manual_seed(7)
        for name, tensor in trained(strategy, devices).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=1e-12)


def chain(*widths: int) -> Chain:
    return Chain([nn.Linear(a, b) for a, b in pairwise(widths)])


def test_loss_that_is_not_finite_ends_the_run() -> None:
    data = [torch.randn(8, 4) for _ in range(6)]
    data[3][0, 0] = float("nan")
    for strategy, devices in (("reference", 1), ("relay", 2)):
        task = ps.Blockwise(chain(4, 4, 4), chain(4, 4, 4))
        trainer = ps.Trainer(task, strategy=strategy, devices=devices, costs=profile_of(2), log_every=1)
        with pytest.raises(TrainingError, match=r"the loss is not finite by batch 4 \(block 0: nan"):
            trainer.fit(data)
