"""A training run without a schedule: the plain loop, with the logs and validations that a run has."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch

from pipestill.model.batchnorm import Norms
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.tasks import Task
from pipestill.runtime.batch import Batch
from pipestill.runtime.pipeline.rank import (
    LogClock,
    Reporter,
    Settings,
    Tally,
    check_finite,
    logged_momentum,
    logged_values,
)
from pipestill.runtime.pipeline.reference import evaluate, reference
from pipestill.runtime.pipeline.stage import OptimizerFactory, gradient_squares


class PlainRun:
    """What `PipelineRank` is for a rank, for `reference`. The models are on `device` already.

    `step_ends` are the moments at which steps ended, the first at which they began, and where validations did.
    """

    def __init__(
        self,
        task: Task,
        contracts: PipelineContracts,
        *,
        settings: Settings,
        microbatches: int,
        device: torch.device,
        optimizer: OptimizerFactory,
        norms: Norms,
        validation: Callable[[], Iterator[Batch]] | None,
        reporter: Reporter,
        staleness: int,
        student_staleness: int,
    ) -> None:
        self.task, self.contracts, self.settings, self.microbatches = task, contracts, settings, microbatches
        self.device, self.norms, self.validation, self.reporter = device, norms, validation, reporter
        self.staleness, self.student_staleness = staleness, student_staleness
        self.trained = {n: p for n, p in task.student.named_parameters() if p.requires_grad}
        self.optimizer = optimizer(self.trained)
        self.losses: dict[str, float] = {}
        self.grad_norm = 0.0
        self.clock, self.step_ends = LogClock(), [time.perf_counter()]

    def run(self, source: Iterator[Batch]) -> None:
        """Train over everything that the source gives."""
        reference(
            self.task, self.contracts, source, self.optimizer, microbatches=self.microbatches,
            lr_factor=self.settings.lr_factor, decay_factor=self.settings.decay_factor, seed=self.settings.seed,
            device=self.device, before_update=self._before_update, after_update=self._after_update, norms=self.norms,
            largest_norm=self.settings.clip, staleness=self.staleness, student_staleness=self.student_staleness,
        )  # fmt: skip

    def _before_update(self, step: int, batch: Batch, losses: dict[str, float]) -> None:
        check_finite(losses, step)
        self.losses = losses
        self.grad_norm = math.sqrt(math.fsum(gradient_squares(self.trained.values()).tolist()))

    def _after_update(self, step: int, batch: Batch) -> None:
        self.clock.count(batch.rows)
        self.step_ends.append(time.perf_counter())
        if (step + 1) % self.settings.log_every == 0 or batch.last:
            seconds, steps, rows = self.clock.lap()
            self.reporter.step(
                logged_values(
                    step, batch.epoch, self.losses, lr=self.settings.lr * self.settings.lr_factor(step), bubble=0.0,
                    grad_norm=self.grad_norm, seconds=seconds / steps, samples_per_second=rows / seconds,
                    **logged_momentum(self.task, step),
                )
            )  # fmt: skip
        if batch.last and self.validation is not None:
            self.reporter.validation(step, batch.epoch, self._evaluate(self.validation()))
            self.clock.forget()
            self.step_ends.append(time.perf_counter())

    def _evaluate(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Metrics of the whole student over `batches`."""
        tally = Tally(self.settings.metrics)
        evaluate(
            self.task.student_blocks, batches, tally.add, microbatches=self.microbatches, seed=self.settings.seed,
            device=self.device,
        )  # fmt: skip
        return tally.means()
