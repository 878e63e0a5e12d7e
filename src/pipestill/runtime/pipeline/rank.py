"""One rank of a training run: its stages, its executor, and what it does at the cuts between steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pipestill.errors import ConfigError, TrainingError
from pipestill.losses import Metric
from pipestill.model.batchnorm import Norms
from pipestill.model.blocks import ranges
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.tasks import Momentum, Task
from pipestill.plan import Plan
from pipestill.runtime.batch import Batch
from pipestill.runtime.pipeline.executor import PipelineExecutor, Waiting
from pipestill.runtime.pipeline.stage import OptimizerFactory, StudentStage, TeacherStage, gradient_squares
from pipestill.runtime.record import Recorder
from pipestill.runtime.transport.protocol import Message, Transport
from pipestill.schedule import Action, Lane, Op, Role, Schedule
from pipestill.schedule.pipeline.gpipe import forward_only


class Reporter(Protocol):
    """Hears of the run on rank 0."""

    def step(self, values: dict[str, float]) -> None:
        """A logged step: step, epoch, loss and its parts, lr, grad_norm, seconds, samples_per_second, bubble."""

    def validation(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """The metrics of a validation."""


@dataclass(frozen=True)
class Settings:
    """What a run does besides its plan; the same on every rank."""

    seed: int
    log_every: int
    lr: float
    lr_factor: Callable[[int], float]
    decay_factor: Callable[[int], float]
    metrics: Mapping[str, Metric]
    validate: bool
    timeout_seconds: float
    clip: float | None = None


class Tally:
    """Sums of metrics over the rows of a validation."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.metrics = metrics
        self.sums = torch.zeros(len(metrics) + 1, dtype=torch.float64)

    def add(self, output: Any, target: Any, rows: int) -> None:
        values = []
        for name, metric in self.metrics.items():
            value = metric(output, target)
            if not isinstance(value, Tensor):
                try:
                    value = torch.as_tensor(value)
                except (TypeError, ValueError, RuntimeError):
                    raise ConfigError(f"metric '{name}' gave {value!r}; expected a scalar") from None
            if value.dim():
                raise ConfigError(f"metric '{name}' gave a tensor of shape {tuple(value.shape)}; expected a scalar")
            values.append(value.detach().double().cpu())
        self.sums += torch.stack([*values, torch.ones((), dtype=torch.float64)]) * rows

    def means(self) -> dict[str, float]:
        return dict(zip(self.metrics, (self.sums[:-1] / self.sums[-1]).tolist(), strict=True))


class LogClock:
    """Time and samples since the last logged step, on the rank that reports."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.steps = self.rows = 0

    def count(self, rows: int) -> None:
        self.steps += 1
        self.rows += rows

    def lap(self) -> tuple[float, int, int]:
        """Seconds, steps and samples since the last lap."""
        now = time.perf_counter()
        lap = (now - self.start, self.steps, self.rows)
        self.start, self.steps, self.rows = now, 0, 0
        return lap

    def forget(self) -> None:
        """Leave out what lies between, such as a validation."""
        self.start = time.perf_counter()


class PipelineRank:
    """Everything that one rank holds and does. `source` and `validation` read data on rank 0 only."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        task: Task,
        contracts: PipelineContracts,
        *,
        settings: Settings,
        device: torch.device,
        optimizer: OptimizerFactory,
        norms: Norms,
        transport: Transport,
        source: Iterator[Batch] | None,
        validation: Callable[[], Iterator[Batch]] | None,
        reporter: Reporter | None,
    ) -> None:
        self.plan, self.rank, self.task, self.contracts, self.settings = plan, rank, task, contracts, settings
        self.transport, self.source, self.validation, self.reporter = transport, source, validation, reporter
        self.structure = plan.schedule.pipeline
        self.recorder = Recorder(rank, device)
        self.student_stages, self.teacher_stages = ranges(plan.student_partition), ranges(plan.teacher_partition)
        self.student = StudentStage(
            task, contracts, self.student_stages[rank], device, settings.seed, optimizer, norms,
            split=self.structure.split, staleness=self.structure.student_staleness,
        )  # fmt: skip
        taught = task.teacher_blocks is not None
        self.teacher = TeacherStage(task, self.teacher_stages[rank], device, settings.seed, norms) if taught else None
        self.holds_loss = self.structure.student_ranks[self.structure.last] == rank
        self.evaluation = forward_only(plan.num_devices, plan.microbatches)
        stages = [task.student_blocks.parameters_of(stage).values() for stage in self.student_stages]
        self.num_trained = [sum(p.requires_grad for p in parameters) for parameters in stages]
        self.num_validations = 0
        self.losses: dict[str, float] = {}
        self.gradient_squares = torch.zeros(0, dtype=torch.float64)
        self.busy_seconds = 0.0
        self.unreported: tuple[int, int, Tensor, dict[str, float]] | None = None
        self.clock = LogClock()

    def run(self) -> Waiting:
        """Train over everything that the source gives."""
        self.task.student_blocks.in_mode(train=False)
        self.task.student_blocks.in_mode(train=True)  # anew: some layers may stay in eval mode
        self.clock.forget()
        executor = self._executor(
            self.plan.schedule, self.source, self.recorder, lr_factor=self.settings.lr_factor,
            decay_factor=self.settings.decay_factor,
            before_update=self._before_update, after_update=self._after_update, clip=self.settings.clip,
            views=isinstance(self.task, Momentum), num_trained=self.num_trained,
        )  # fmt: skip
        yield from executor.run()
        self.task.student.train()  # where the last thing was a validation

    def _executor(
        self, schedule: Schedule, source: Iterator[Batch] | None, recorder: Recorder, **rest: Any
    ) -> PipelineExecutor:
        return PipelineExecutor(
            schedule, self.rank, contracts=self.contracts, student_stages=self.student_stages,
            teacher_stages=self.teacher_stages, student=self.student, teacher=self.teacher,
            transport=self.transport, recorder=recorder, source=source, **rest,
        )  # fmt: skip

    # -- the cut after a step -----------------------------------------------------------------------------------

    def _logged(self, step: int, batch: Batch) -> bool:
        return (step + 1) % self.settings.log_every == 0 or batch.last

    def _before_update(self, step: int, batch: Batch) -> None:
        if self.holds_loss:
            self.losses = self.student.take_losses()
            check_finite(self.losses, step)
        if self._logged(step, batch):
            self.gradient_squares = gradient_squares(self.student.parameters.values())

    def _after_update(self, step: int, batch: Batch) -> Waiting:
        self.clock.count(batch.rows)
        yield from self._report()
        if self._logged(step, batch):
            self._log(step, batch)
        if batch.last:
            yield from self._report()
        if batch.last and self.settings.validate:
            yield from self._validate(step, batch)
            self.recorder.interrupted_after(step)
            self.clock.forget()

    def _log(self, step: int, batch: Batch) -> None:
        """Send what rank 0 has to know of a step. It looks at it after its next update, or now where all ranks meet: others
        may update later than rank 0, and wait for it meanwhile.
        """
        busy, self.busy_seconds = self.recorder.busy_seconds - self.busy_seconds, self.recorder.busy_seconds
        losses = [self.losses.get(name, 0.0) for name in self.contracts.loss_parts]
        mine = torch.cat([torch.tensor([busy, *losses], dtype=torch.float64), self.gradient_squares])
        if self.rank:
            self.transport.send(self._message(step, self.rank), [mine])
            return
        seconds, steps, rows = self.clock.lap()
        timing = {"seconds": seconds / steps, "samples_per_second": rows / seconds, "lap": seconds}
        self.unreported = (step, batch.epoch, mine, timing)
        for rank in range(1, self.structure.num_ranks):
            size = 1 + len(losses) + self.num_trained[rank]
            self.transport.post(self._message(step, rank), [torch.empty(size, dtype=torch.float64)])

    @staticmethod
    def _message(step: int, rank: int) -> Message:
        return Message(Lane.REPORT, Action(Role.STUDENT, rank, Op.UPDATE, None, step), rank, 0)

    def _report(self) -> Waiting:
        """Tell the reporter of the step that was logged last, if it has not heard of it."""
        if self.unreported is None:
            return
        (step, epoch, mine, timing), self.unreported = self.unreported, None
        count = 1 + len(self.contracts.loss_parts)
        total, squares = mine[:count], mine[count:].tolist()
        for rank in range(1, self.structure.num_ranks):
            message = self._message(step, rank)
            while not self.transport.arrived(message):
                yield message
            (theirs,) = self.transport.take(message)
            total = total + theirs[:count]
            squares += theirs[count:].tolist()
        if self.reporter is not None:
            self.reporter.step(self._values(step, epoch, total.tolist(), squares, timing))

    def _values(
        self, step: int, epoch: int, total: list[float], squares: list[float], timing: dict[str, float]
    ) -> dict[str, float]:
        busy, *losses = total
        return logged_values(
            step, epoch, dict(zip(self.contracts.loss_parts, losses, strict=True)), **logged_momentum(self.task, step),
            lr=self.settings.lr * self.settings.lr_factor(step), grad_norm=math.sqrt(math.fsum(squares)),
            seconds=timing["seconds"], samples_per_second=timing["samples_per_second"],
            bubble=max(0.0, 1.0 - busy / (timing["lap"] * self.structure.num_ranks)),
        )  # fmt: skip

    def _validate(self, step: int, batch: Batch) -> Waiting:
        self.num_validations += 1
        tally = Tally(self.settings.metrics)
        source = self.validation() if self.validation is not None else None
        apart = Recorder(self.rank, self.recorder.device, num_steps=1)
        executor = self._executor(self.evaluation, source, apart, metric=tally.add, phase=self.num_validations)
        yield from executor.run()
        last = self.structure.last
        message = Message(
            Lane.REPORT, Action(Role.STUDENT, last, Op.UPDATE, None, 0),
            self.structure.student_ranks[last], 0, self.num_validations,
        )  # fmt: skip
        if message.source != 0:
            if self.rank == message.source:
                self.transport.send(message, [tally.sums])
            elif self.rank == 0:
                tally.sums = yield from self._receive(message, torch.empty_like(tally.sums))
        if self.reporter is not None:
            self.reporter.validation(step, batch.epoch, tally.means())

    def _receive(self, message: Message, buffer: Tensor) -> Generator[Message, None, Tensor]:
        self.transport.post(message, [buffer])
        while not self.transport.arrived(message):
            yield message
        return self.transport.take(message)[0]


def logged_momentum(task: Task, step: int) -> dict[str, float]:
    """The teacher's momentum after a step, for tasks that have one."""
    return {"momentum": task.momentum_at(step)} if isinstance(task, Momentum) else {}


def logged_values(step: int, epoch: int, losses: dict[str, float], **rest: float) -> dict[str, float]:
    """One line of metrics.jsonl."""
    parts = losses if len(losses) > 1 else {}
    return {"step": step + 1, "epoch": epoch + 1, "loss": sum(losses.values()), **parts, **rest}


def check_finite(losses: dict[str, float], step: int) -> None:
    """`TrainingError` when a part of the loss is NaN or infinite; the weights are still those before the step."""
    if not all(map(math.isfinite, losses.values())):
        parts = ", ".join(f"{name} {value:g}" for name, value in losses.items())
        raise TrainingError(
            f"the loss is not finite in step {step + 1} ({parts}); no update was made with it; "
            "lower the learning rate, or look at the data of that step"
        )
