"""One rank of a pipeline run: its stages, its executor, and what it does between steps; and the run of the plain loop."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipestill.model.blocks import ranges
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.tasks import Momentum, Task
from pipestill.plan import Plan
from pipestill.runtime.batch import Batch
from pipestill.runtime.pipeline.boundaries import Boundaries
from pipestill.runtime.pipeline.executor import PipelineExecutor
from pipestill.runtime.pipeline.features import trained_beside
from pipestill.runtime.pipeline.reference import Reference
from pipestill.runtime.pipeline.stage import StudentStage, TeacherStage, gradient_squares
from pipestill.runtime.pipeline.ties import counted_once, gradient_forms
from pipestill.runtime.record import Recorder
from pipestill.runtime.reports import LogClock, MetricMeans, RunListener, StepReports, check_finite, logged_values
from pipestill.runtime.settings import PipelineSettings
from pipestill.runtime.transport.message import Message
from pipestill.runtime.transport.protocol import Waiting, World, receive
from pipestill.schedule import Action, Lane, Op, Role, Schedule
from pipestill.schedule.comms import edges
from pipestill.schedule.pipeline.sequential import forward_only
from pipestill.schedule.pipeline.structure import PipelineStructure


@dataclass(frozen=True)
class RankZero:
    """What only rank 0 has: the batches to train on, those of a validation (opened anew for each), and the listener."""

    batches: Iterator[Batch]
    validation: Callable[[], Iterator[Batch]] | None
    listener: RunListener


@dataclass(eq=False)
class PipelineRank:
    """Everything that one rank of a pipeline run holds and does. `zero` is None on all ranks but 0."""

    plan: Plan
    rank: int
    task: Task
    contracts: PipelineContracts
    settings: PipelineSettings
    device: torch.device
    world: World
    zero: RankZero | None

    def __post_init__(self) -> None:
        self.structure = self.plan.schedule.structure
        self.transport = self.world.transport(self.rank, edges(self.structure), self.settings.timeout_seconds)
        self.recorder = Recorder(self.rank, self.device)
        self.student_stages = ranges(self.plan.student_partition)
        self.teacher_stages = ranges(self.plan.teacher_partition)
        self.student = StudentStage(
            self.task, self.contracts, self.student_stages[self.rank], self.device, self.settings,
            halves=self.structure.split, staleness=self.structure.student_staleness,
        )  # fmt: skip
        self.teacher = None
        if self.task.teacher_blocks is not None:
            self.teacher = TeacherStage(self.task, self.contracts, self.teacher_stages[self.rank], self.device, self.settings)
        self.loss_rank = self.structure.student_ranks[self.structure.last]
        self.evaluation = forward_only(self.plan.num_devices, self.plan.microbatches)
        student = self.task.student_blocks
        counted = counted_once(student, self.student_stages)
        beside = [trained_beside(self.task, stage).values() for stage in self.student_stages]
        trained = [[*mine, *other] for mine, other in zip(counted, beside, strict=True)]
        self.boundaries = Boundaries(
            self.structure, self.contracts, self.student_stages, self.teacher_stages, views=isinstance(self.task, Momentum),
            num_trained=[sum(p.requires_grad for p in parameters) for parameters in trained],
            taps=[pair.tap for pair in self.task.feature_losses.pairs],
            tied=[gradient_forms(student, stage) for stage in self.student_stages],
        )  # fmt: skip
        self.num_validations = 0
        self.losses: dict[str, float] = {}
        self.gradient_squares = torch.zeros(0, dtype=torch.float64)
        self.reports = StepReports(self.transport, self.rank, range(self.structure.num_ranks), self.recorder)

    def run(self) -> Waiting:
        """Train over all batches of rank 0."""
        self.task.student_blocks.in_mode(train=False)
        self.task.student_blocks.in_mode(train=True)  # anew: some layers may stay in eval mode
        self.reports.clock.skip()
        yield from self._executor(
            self.plan.schedule, self.zero.batches if self.zero else None, self.recorder,
            largest_norm=self.settings.largest_norm, before_update=self._before_update, after_update=self._after_update,
        ).run()  # fmt: skip
        self.task.student.train()  # the last thing that ran may have been a validation

    def _executor(
        self, schedule: Schedule[PipelineStructure], source: Iterator[Batch] | None, recorder: Recorder, **rest: Any
    ) -> PipelineExecutor:
        boundaries = replace(self.boundaries, structure=schedule.structure)
        return PipelineExecutor(
            schedule, self.rank, boundaries=boundaries, student=self.student, teacher=self.teacher,
            transport=self.transport, recorder=recorder, source=source, **rest,
        )  # fmt: skip

    # -- around an update -----------------------------------------------------------------------------------------

    def _is_logged(self, step: int, batch: Batch) -> bool:
        return (step + 1) % self.settings.log_every == 0 or batch.last

    def _before_update(self, step: int, batch: Batch) -> None:
        self.losses = self.student.take_losses()  # none where the stage has no loss
        check_finite(self.losses, step)
        if self._is_logged(step, batch):
            self.gradient_squares = gradient_squares(self.student.counted)

    def _after_update(self, step: int, batch: Batch) -> Waiting:
        self.reports.clock.count(batch.rows)
        yield from self._report()
        if self._is_logged(step, batch):
            self._give_figures(step, batch)
        if batch.last:
            yield from self._report()
        if batch.last and self.settings.validate:
            yield from self._validate(step, batch)
            self.recorder.interrupted_after(step)
            self.reports.clock.skip()

    def _give_figures(self, step: int, batch: Batch) -> None:
        """Give this rank's part of a logged step: busy seconds, parts of the loss, squared norms of gradients.

        Rank 0 reports the step after its next update, or at once where all ranks meet.
        """
        losses = [self.losses.get(name, 0.0) for name in self.contracts.all_parts]
        sizes = [len(losses) + count for count in self.boundaries.num_trained]
        figures = [*losses, *self.gradient_squares.tolist()]
        self.reports.give(step, step, batch.epoch, self.reports.clock.lap(), figures, sizes)

    def _report(self) -> Waiting:
        """Report the step that was logged last, unless that was done before."""
        logged = yield from self.reports.collect()
        if logged is None or self.zero is None:
            return
        count = len(self.contracts.all_parts)
        first, *others = (of_rank[:count] for of_rank in logged.figures)
        losses = dict(zip(self.contracts.all_parts, sum(others, first).tolist(), strict=True))
        squares = [square for of_rank in logged.figures for square in of_rank[count:].tolist()]
        self.zero.listener.step(
            logged_values(
                logged.step, logged.epoch, losses, **_logged_momentum(self.task, logged.step), **logged.times,
                lr=self.settings.schedules.lr_at(logged.step), grad_norm=math.sqrt(math.fsum(squares)),
            )
        )  # fmt: skip

    # -- validation -----------------------------------------------------------------------------------------------

    def _validate(self, step: int, batch: Batch) -> Waiting:
        """Run the validation data forward over all stages, and report the metrics' means."""
        self.num_validations += 1
        means = MetricMeans(self.settings.metrics)
        open_validation = self.zero.validation if self.zero else None
        executor = self._executor(
            self.evaluation, open_validation() if open_validation else None,
            Recorder(self.rank, self.recorder.device, num_steps=1), metric=means.add, segment=self.num_validations,
        )  # fmt: skip
        yield from executor.run()
        update = Action(Role.STUDENT, self.structure.last, Op.UPDATE, None, 0)
        message = Message(Lane.REPORT, update, self.loss_rank, 0, self.num_validations)
        if self.rank == self.loss_rank != 0:
            self.transport.send(message, [means.sums])
        elif self.rank == 0 != self.loss_rank:
            self.transport.post(message, [torch.empty_like(means.sums)])
            (means.sums,) = yield from receive(self.transport, message)
        if self.zero is not None:
            self.zero.listener.validation(step, batch.epoch, means.means())


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
                    step, batch.epoch, self.losses, **_logged_momentum(self.reference.task, step), grad_norm=self.grad_norm,
                    lr=self.settings.schedules.lr_at(step), **self.clock.lap().values(bubble=0.0),
                )
            )  # fmt: skip
        if batch.last and self.zero.validation is not None:
            means = MetricMeans(self.settings.metrics)
            self.reference.evaluate(self.zero.validation(), means.add)
            self.zero.listener.validation(step, batch.epoch, means.means())
            self.clock.skip()
            self.moments.append(time.perf_counter())


def _logged_momentum(task: Task, step: int) -> dict[str, float]:
    """The teacher's momentum after a step, for tasks that have one."""
    return {"momentum": task.momentum_at(step)} if isinstance(task, Momentum) else {}
