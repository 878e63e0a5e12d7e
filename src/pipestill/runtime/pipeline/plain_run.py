"""A training run without a schedule: the plain loop, with the logs and validations that a run has."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.tasks import Task
from pipestill.runtime.batch import Batch
from pipestill.runtime.pipeline.rank import RankZero, logged_momentum
from pipestill.runtime.pipeline.reference import Reference, evaluate
from pipestill.runtime.pipeline.stage import gradient_squares
from pipestill.runtime.reports import LogClock, MetricMeans, check_finite, logged_values
from pipestill.runtime.settings import PipelineSettings


@dataclass(eq=False)
class PlainRun:
    """The reference strategy as a run: what `PipelineRank` is for the other strategies. The models are on `device` already."""

    task: Task
    contracts: PipelineContracts
    settings: PipelineSettings
    device: torch.device
    zero: RankZero
    microbatches: int
    staleness: int
    student_staleness: int
    first_step: int = 0

    def __post_init__(self) -> None:
        self.reference = Reference(
            self.task, self.contracts, settings=self.settings, device=self.device, num_microbatches=self.microbatches,
            staleness=self.staleness, student_staleness=self.student_staleness, first_step=self.first_step,
        )  # fmt: skip
        self.losses: dict[str, float] = {}
        self.grad_norm = 0.0
        self.clock = LogClock()
        self.moments = [time.perf_counter()]
        """When training began, and when each step and each validation ended."""

    def run(self) -> None:
        """Train over all batches."""
        self.reference.train(self.zero.batches, before_update=self._before_update, after_update=self._after_update)

    def _before_update(self, step: int, batch: Batch, losses: dict[str, float]) -> None:
        check_finite(losses, step)
        self.losses = losses
        self.grad_norm = math.sqrt(math.fsum(gradient_squares(self.reference.trained.values()).tolist()))

    def _after_update(self, step: int, batch: Batch) -> None:
        self.clock.count(batch.rows)
        self.moments.append(time.perf_counter())
        if (step + 1) % self.settings.log_every == 0 or batch.last:
            self.zero.listener.step(
                logged_values(
                    step, batch.epoch, self.losses, **logged_momentum(self.task, step), grad_norm=self.grad_norm,
                    lr=self.settings.schedules.lr_at(step), **self.clock.lap().values(bubble=0.0),
                )
            )  # fmt: skip
        if batch.last and self.zero.validation is not None:
            self.zero.listener.validation(step, batch.epoch, self._evaluate(self.zero.validation()))
            self.clock.skip()
            self.moments.append(time.perf_counter())

    def _evaluate(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Metrics of the whole student over `batches`."""
        means = MetricMeans(self.settings.metrics)
        evaluate(
            self.task.student_blocks, batches, means.add, num_microbatches=self.microbatches, seed=self.settings.seed,
            device=self.device,
        )  # fmt: skip
        return means.means()
