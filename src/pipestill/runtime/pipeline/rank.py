"""One rank of a pipeline run: its stages, its executor, and what it does between steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pipestill.model.blocks import ranges
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.tasks import Momentum, Task
from pipestill.plan import Plan
from pipestill.runtime.batch import Batch
from pipestill.runtime.log_clock import Lap, LogClock
from pipestill.runtime.metrics import MetricMeans
from pipestill.runtime.pipeline.boundaries import Boundaries
from pipestill.runtime.pipeline.executor import PipelineExecutor, UpdateRules
from pipestill.runtime.pipeline.stage import StudentStage, TeacherStage, gradient_squares
from pipestill.runtime.record import Recorder
from pipestill.runtime.reports import FigureExchange, RunListener, check_finite, logged_values
from pipestill.runtime.settings import PipelineSettings
from pipestill.runtime.transport.protocol import Message, Waiting, receive
from pipestill.runtime.world import World
from pipestill.schedule import Action, Lane, Op, Role, Schedule
from pipestill.schedule.comms import edges
from pipestill.schedule.pipeline.forward_only import forward_only
from pipestill.schedule.pipeline.structure import PipelineStructure


@dataclass(frozen=True)
class RankZero:
    """What only rank 0 has: the batches to train on, those of a validation (opened anew for each), and the listener."""

    batches: Iterator[Batch]
    validation: Callable[[], Iterator[Batch]] | None
    listener: RunListener


class PipelineRank:
    """Everything that one rank of a pipeline run holds and does. `zero` is None on all ranks but 0."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        task: Task,
        contracts: PipelineContracts,
        *,
        settings: PipelineSettings,
        device: torch.device,
        world: World,
        zero: RankZero | None,
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.task = task
        self.contracts = contracts
        self.settings = settings
        self.zero = zero
        self.structure = plan.schedule.structure
        self.transport = world.transport(rank, edges(self.structure), settings.timeout_seconds)
        self.recorder = Recorder(rank, device)
        self.student_stages = ranges(plan.student_partition)
        self.teacher_stages = ranges(plan.teacher_partition)
        self.student = StudentStage(
            task, contracts, self.student_stages[rank], device, settings.seed, settings.optimizer, settings.norms,
            schedules=settings.schedules, split=self.structure.split, staleness=self.structure.student_staleness,
        )  # fmt: skip
        self.teacher = None
        if task.teacher_blocks is not None:
            self.teacher = TeacherStage(task, self.teacher_stages[rank], device, settings.seed, settings.norms)
        self.holds_loss = self.structure.student_ranks[self.structure.last] == rank
        self.evaluation = forward_only(plan.num_devices, plan.microbatches)
        stages = [task.student_blocks.parameters_of(stage).values() for stage in self.student_stages]
        self.boundaries = Boundaries(
            contracts, self.student_stages, self.teacher_stages, views=isinstance(task, Momentum),
            num_trained=[sum(p.requires_grad for p in parameters) for parameters in stages],
        )  # fmt: skip
        self.num_validations = 0
        self.losses: dict[str, float] = {}
        self.gradient_squares = torch.zeros(0, dtype=torch.float64)
        self.reported_busy_seconds = 0.0
        self.exchange = FigureExchange(self.transport, rank, range(self.structure.num_ranks))
        self.unreported: _LoggedStep | None = None
        self.clock = LogClock()

    def run(self) -> Waiting:
        """Train over all batches of rank 0."""
        self.task.student_blocks.in_mode(train=False)
        self.task.student_blocks.in_mode(train=True)  # anew: some layers may stay in eval mode
        self.clock.skip()
        rules = UpdateRules(
            largest_norm=self.settings.largest_norm, before=self._before_update, after=self._after_update
        )  # fmt: skip
        source = self.zero.batches if self.zero else None
        yield from self._executor(self.plan.schedule, source, self.recorder, rules=rules).run()
        self.task.student.train()  # the last thing that ran may have been a validation

    def _executor(
        self, schedule: Schedule[PipelineStructure], source: Iterator[Batch] | None, recorder: Recorder, **rest: Any
    ) -> PipelineExecutor:
        return PipelineExecutor(
            schedule, self.rank, boundaries=self.boundaries, student=self.student, teacher=self.teacher,
            transport=self.transport, recorder=recorder, source=source, **rest,
        )  # fmt: skip

    # -- around an update -----------------------------------------------------------------------------------------

    def _is_logged(self, step: int, batch: Batch) -> bool:
        return (step + 1) % self.settings.log_every == 0 or batch.last

    def _before_update(self, step: int, batch: Batch) -> None:
        if self.holds_loss:
            self.losses = self.student.take_losses()
            check_finite(self.losses, step)
        if self._is_logged(step, batch):
            self.gradient_squares = gradient_squares(self.student.parameters.values())

    def _after_update(self, step: int, batch: Batch) -> Waiting:
        self.clock.count(batch.rows)
        yield from self._report()
        if self._is_logged(step, batch):
            self._give_figures(step, batch)
        if batch.last:
            yield from self._report()
        if batch.last and self.settings.validate:
            yield from self._validate(step, batch)
            self.recorder.interrupted_after(step)
            self.clock.skip()

    def _give_figures(self, step: int, batch: Batch) -> None:
        """Give this rank's part of a logged step: busy seconds, parts of the loss, squared norms of gradients.

        Rank 0 reports the step after its next update, or at once where all ranks meet.
        """
        busy = self.recorder.busy_seconds - self.reported_busy_seconds
        self.reported_busy_seconds = self.recorder.busy_seconds
        losses = [self.losses.get(name, 0.0) for name in self.contracts.loss_parts]
        mine = torch.cat([torch.tensor([busy, *losses], dtype=torch.float64), self.gradient_squares])
        if self.exchange.reports:
            self.unreported = _LoggedStep(step, batch.epoch, self.clock.lap())
        self.exchange.give(step, mine, [1 + len(losses) + count for count in self.boundaries.num_trained])

    def _report(self) -> Waiting:
        """Report the step that was logged last, unless that was done before."""
        figures = yield from self.exchange.collect()
        logged, self.unreported = self.unreported, None
        if logged is None:
            return
        count = 1 + len(self.contracts.loss_parts)
        first, *others = (of_rank[:count] for of_rank in figures)
        busy, *losses = sum(others, first).tolist()
        squares = [square for of_rank in figures for square in of_rank[count:].tolist()]
        values = logged_values(
            logged.step, logged.epoch, dict(zip(self.contracts.loss_parts, losses, strict=True)),
            **logged_momentum(self.task, logged.step), lr=self.settings.schedules.lr_at(logged.step),
            grad_norm=math.sqrt(math.fsum(squares)), seconds=logged.lap.seconds / logged.lap.steps,
            samples_per_second=logged.lap.rows / logged.lap.seconds,
            bubble=max(0.0, 1.0 - busy / (logged.lap.seconds * self.structure.num_ranks)),
        )  # fmt: skip
        if self.zero is not None:
            self.zero.listener.step(values)

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
        last = self.structure.last
        message = Message(
            Lane.REPORT, Action(Role.STUDENT, last, Op.UPDATE, None, 0),
            self.structure.student_ranks[last], 0, self.num_validations,
        )  # fmt: skip
        if message.source != 0:
            if self.rank == message.source:
                self.transport.send(message, [means.sums])
            elif self.rank == 0:
                self.transport.post(message, [torch.empty_like(means.sums)])
                (means.sums,) = yield from receive(self.transport, message)
        if self.zero is not None:
            self.zero.listener.validation(step, batch.epoch, means.means())


@dataclass(frozen=True)
class _LoggedStep:
    """A logged step that rank 0 has not reported yet, since the other ranks' figures are still to come."""

    step: int
    epoch: int
    lap: Lap


def logged_momentum(task: Task, step: int) -> dict[str, float]:
    """The teacher's momentum after a step, for tasks that have one."""
    return {"momentum": task.momentum_at(step)} if isinstance(task, Momentum) else {}
