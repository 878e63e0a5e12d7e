"""A training run without a schedule: the plain loop, with the logs and validations that a run has."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from pipestill.runtime.batch import Batch
from pipestill.runtime.pipeline.rank import RankZero, logged_momentum
from pipestill.runtime.pipeline.reference import Reference
from pipestill.runtime.pipeline.stage import gradient_squares
from pipestill.runtime.reports import LogClock, MetricMeans, check_finite, logged_values


@dataclass(eq=False)
class PlainRun:
    """The reference strategy as a run: what `PipelineRank` is for the other strategies."""

    reference: Reference
    zero: RankZero

    def __post_init__(self) -> None:
        self.settings = self.reference.settings
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
                    step, batch.epoch, self.losses, **logged_momentum(self.reference.task, step), grad_norm=self.grad_norm,
                    lr=self.settings.schedules.lr_at(step), **self.clock.lap().values(bubble=0.0),
                )
            )  # fmt: skip
        if batch.last and self.zero.validation is not None:
            means = MetricMeans(self.settings.metrics)
            self.reference.evaluate(self.zero.validation(), means.add)
            self.zero.listener.validation(step, batch.epoch, means.means())
            self.clock.skip()
            self.moments.append(time.perf_counter())
