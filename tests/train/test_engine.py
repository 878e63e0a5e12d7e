"""A kind of training is an engine: the trainer serves one that it has never seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from support.models import vectors
from torch import nn

import pipestill as ps
from pipestill.errors import ConfigError, PlanError
from pipestill.train.engine import Engine, FirstBatch, Rank, Run
from pipestill.train.result import Figures
from pipestill.train.trainer import ENGINES


@dataclass(frozen=True)
class Averaging:
    """A toy: the student's only parameter is the mean of all inputs, which ranks share out by columns."""

    student: nn.ParameterList


class ColumnRank:
    """Averages the columns of one rank; all batches are read beforehand."""

    def __init__(self, rank: int, num_ranks: int, batches: list[Any], mean: torch.Tensor) -> None:
        self.columns = slice(rank, None, num_ranks)
        self.batches = batches
        self.mean = mean

    def run(self) -> Iterator[Any]:
        rows = torch.cat([batch.inputs for batch in self.batches])
        self.mean[self.columns] = rows[:, self.columns].mean(0)
        yield from ()


class AveragingEngine(Engine):
    strategies: ClassVar[dict[str, str]] = {"columns": "each rank averages some columns"}
    default_strategy = "columns"
    validates = False

    @property
    def models(self) -> Sequence[nn.Module]:
        return [self.options.task.student]

    @property
    def changed_modules(self) -> dict[str, nn.Module]:
        return {"student": self.options.task.student}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.options.task.student.named_parameters())

    def contracts(self, sample: tuple[Any, Any]) -> int:
        return int(sample[0].shape[1])

    def measure(self, world: Any, contracts: int, first: FirstBatch) -> float:
        return 2.0 * contracts

    def assumed_costs(self, rows: int) -> float:
        return 1.0

    def plan(self, costs: float, rows: int, *, memory_bytes: float | None = None) -> dict[str, float]:
        if memory_bytes is not None and memory_bytes < rows:
            raise PlanError("too little memory")
        return {"seconds": costs / self.options.devices}

    def plain(self, run: Run) -> Figures:
        rank = ColumnRank(0, 1, list(run.data()), self.options.task.student[0].data)
        list(rank.run())
        return self._figures(run, 1.0)

    def ranks(self, run: Run) -> Sequence[Rank]:
        batches = list(run.data())
        mean = self.options.task.student[0].data
        return [ColumnRank(rank, run.world.num_ranks, batches, mean) for rank in run.world.ranks]  # type: ignore[misc]

    def collect(self, run: Run, ranks: Sequence[Any], seconds: float) -> Figures:
        assert len(ranks) == self.options.devices
        return self._figures(run, seconds)

    def _figures(self, run: Run, seconds: float) -> Figures:
        steps, samples = run.data.counts()
        return Figures(steps=steps, samples=samples, seconds=seconds, seconds_per_step=seconds, metrics={}, losses={})


@pytest.fixture
def third_kind(monkeypatch: pytest.MonkeyPatch) -> Averaging:
    monkeypatch.setitem(ENGINES, Averaging, AveragingEngine)
    return Averaging(nn.ParameterList([torch.zeros(4)]))


@pytest.mark.parametrize(("strategy", "devices"), [("reference", 1), (None, 2), ("columns", 4)])
def test_a_third_kind_of_training_is_one_engine(third_kind: Averaging, strategy: str | None, devices: int) -> None:
    trainer = ps.Trainer(third_kind, strategy=strategy, devices=devices, device="cpu")
    result = trainer.fit(vectors((6, 5)), epochs=2)
    inputs = torch.cat([x for x, _ in vectors((6, 5))])
    assert torch.allclose(third_kind.student[0], inputs.mean(0))
    assert (result.strategy, result.steps, result.samples) == (strategy or "columns", 4, 22)
    assert result.plan == (None if strategy == "reference" else {"seconds": 8.0 / devices})
    assert len(result.peak_memory_bytes) == (1 if strategy == "reference" else devices)
    assert trainer.engine.state().parameters.keys() == {"student.0"}


def test_the_trainer_refuses_for_every_kind(third_kind: Averaging) -> None:
    with pytest.raises(ConfigError, match="no strategy 'fill' for Averaging; there are reference, columns"):
        ps.Trainer(third_kind, strategy="fill", device="cpu")
    trainer = ps.Trainer(third_kind, memory=3, devices=2, device="cpu")
    with pytest.raises(PlanError, match="too little memory"):
        trainer.fit(vectors((6,)))
    trainer.preflight(vectors((6,)))
    assert (trainer.measure(vectors((6,))), ps.Trainer(third_kind, device="cpu").plan(vectors((6,)))) == (8.0, {"seconds": 8.0})
    with pytest.raises(ConfigError, match="Averaging has no validation"):
        trainer.fit(vectors((6,)), validate=vectors((6,)))
