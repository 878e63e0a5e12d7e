"""What a run reports while it trains: who listens, what a logged step and a validation say, and when a loss is refused."""

import math
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pipestill.errors import ConfigError, TrainingError
from pipestill.losses import Metric
from pipestill.losses.counted import counts_of, with_sums
from pipestill.model.nests import distinct_tensors
from pipestill.runtime.record import Recorder
from pipestill.runtime.transport.message import Message
from pipestill.runtime.transport.protocol import Transport, receive
from pipestill.schedule import Action, Lane, Op, Role


class RunListener(Protocol):
    """Receives the reports of a run, on rank 0 only."""

    def step(self, values: dict[str, float]) -> None:
        """A logged step: step, epoch, loss and its parts, lr, seconds, samples_per_second, bubble and more."""

    def validation(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """The metrics of a validation after a step."""


class Lap(NamedTuple):
    """The time between two logged steps, and the steps and samples that were trained in it."""

    seconds: float
    steps: int
    rows: int

    def values(self, bubble: float) -> dict[str, float]:
        """What a logged step says of the time: seconds of a step, samples a second, and the ranks' idle fraction."""
        return {"seconds": self.seconds / self.steps, "samples_per_second": self.rows / self.seconds, "bubble": bubble}


class LogClock:
    """Counts time, steps and samples since the last logged step, on the rank that reports."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._steps = 0
        self._rows = 0

    def count(self, rows: int, steps: int = 1) -> None:
        """Count trained steps and their samples."""
        self._steps += steps
        self._rows += rows

    def lap(self) -> Lap:
        """Everything since the last lap; the next one starts now."""
        now = time.perf_counter()
        lap = Lap(now - self._start, self._steps, self._rows)
        self._start = now
        self._steps = 0
        self._rows = 0
        return lap

    def skip(self) -> None:
        """Start the time anew, so that what has just happened (a validation, say) does not count."""
        self._start = time.perf_counter()


@dataclass(frozen=True)
class LoggedStep:
    """A logged step, once the figures of all ranks are together."""

    step: int
    epoch: int
    times: dict[str, float]
    figures: list[Tensor]
    """One tensor for each rank."""


@dataclass(eq=False)
class StepReports:
    """Brings each rank's figures of a logged step to the first of `ranks`, which reports them.

    The reporting rank gives its own figures at the end of a step and collects the others' later: they may update after
    it, and wait for it meanwhile.
    """

    transport: Transport
    rank: int
    ranks: Sequence[int]
    recorder: Recorder
    segment: int = 0

    def __post_init__(self) -> None:
        self.clock = LogClock()
        self.reported_busy_seconds = 0.0
        self._given: tuple[int, LoggedStep, Lap] | None = None
        """On the reporting rank, what it has not collected yet: the number of its messages, its own figures, their time."""

    def give(self, number: int, step: int, epoch: int, lap: Lap, figures: Sequence[float], sizes: Sequence[int]) -> None:
        """Send this rank's figures or, on the reporting rank, announce those of all ranks, by their sizes.

        `number` tells the messages of one logged step from those of others.
        """
        busy = self.recorder.busy_seconds - self.reported_busy_seconds
        self.reported_busy_seconds = self.recorder.busy_seconds
        mine = torch.tensor([busy, *figures], dtype=torch.float64)
        if self.rank != self.ranks[0]:
            self.transport.send(self._message(number, self.rank), [mine])
            return
        self._given = number, LoggedStep(step, epoch, {}, [mine]), lap
        for rank, size in zip(self.ranks[1:], sizes[1:], strict=True):
            self.transport.post(self._message(number, rank), [torch.empty(1 + size, dtype=torch.float64)])

    def collect(self) -> Generator[Message, None, LoggedStep | None]:
        """The step that was given last, with the figures of all ranks; None where it was collected before, and elsewhere."""
        if self._given is None:
            return None
        number, logged, lap = self._given
        self._given = None
        figures = logged.figures
        for rank in self.ranks[1:]:
            figures += yield from receive(self.transport, self._message(number, rank))
        busy = sum(float(of_rank[0]) for of_rank in figures)
        times = lap.values(bubble=max(0.0, 1.0 - busy / (lap.seconds * len(self.ranks))))
        return replace(logged, times=times, figures=[of_rank[1:] for of_rank in figures])

    def _message(self, number: int, rank: int) -> Message:
        action = Action(Role.STUDENT, rank, Op.UPDATE, None, number)
        return Message(Lane.REPORT, action, rank, self.ranks[0], self.segment)


def logged_values(step: int, epoch: int, losses: Mapping[str, float], **rest: float) -> dict[str, float]:
    """One line of metrics.jsonl for models that are trained end to end: the loss, and its parts where it has several."""
    parts = losses if len(losses) > 1 else {}
    return {"step": step + 1, "epoch": epoch + 1, "loss": sum(losses.values()), **parts, **rest}


def logged_blocks(step: int, epoch: int, losses: Mapping[int, float], **rest: float) -> dict[str, float]:
    """One line of metrics.jsonl for blockwise training: the sum of their losses, and each."""
    parts = {f"block_{block}": loss for block, loss in losses.items()}
    return {"step": step + 1, "epoch": epoch + 1, "loss": math.fsum(losses.values()), **parts, **rest}


def check_finite(losses: Mapping[str, float], step: int, why: Callable[[], str] | None = None) -> None:
    """`TrainingError` when a part of the loss is NaN or infinite; the weights are still those before the step.

    `why` finds out where that comes from (default: it is not known).
    """
    if not all(map(math.isfinite, losses.values())):
        parts = ", ".join(f"{name} {value:g}" for name, value in losses.items())
        advice = "lower the learning rate, or look at the data of that step and at the teacher" if why is None else why()
        raise TrainingError(f"the loss is not finite in step {step + 1} ({parts}); no update was made with it; {advice}")


def why_not_finite(student: Any, teacher: Any, target: Any) -> str:
    """Find out where a loss that is not finite comes from, of what it was given, and say what to do."""
    if not _finite(target):
        return "the targets are not finite (NaN or infinity): look at the data of that step"
    of_student, of_teacher = _finite(student), _finite(teacher)
    if not of_student and not of_teacher:
        return (
            "neither model's output is finite, and they have only their inputs in common: look for NaN or infinity in the data "
            "of that step"
        )
    if not of_teacher:
        return "the teacher's output is not finite, and the student's is: look at the teacher, its weights and its precision"
    if not of_student:
        other = "; the teacher's is finite, so the data is not to blame" if distinct_tensors(teacher) else ", or look at the data"
        return f"the student's output is not finite: lower the learning rate, or clip gradients (clip_grad_norm){other}"
    return "all outputs and targets are finite, so the loss itself makes it: look for a log of 0, a division by 0, or an overflow"


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in distinct_tensors(value))


def check_finite_blocks(losses: Mapping[int, float], step: int) -> None:
    """`TrainingError` when a block's loss is NaN or infinite."""
    wrong = [f"block {block}: {loss:g}" for block, loss in losses.items() if not math.isfinite(loss)]
    if wrong:
        raise TrainingError(
            f"the loss is not finite by batch {step + 1} ({', '.join(wrong)}); lower the learning rate, or look at the data"
        )


class MetricMeans:
    """Adds up metrics, and gives their means: over rows, or over what a metric counts (see `pipestill.losses.metrics`).

    `sums` holds a float64 sum and a weight for each metric, (2, metrics); it travels between ranks.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.metrics = metrics
        self.sums = torch.zeros(2, len(metrics), dtype=torch.float64)

    def add(self, output: Any, target: Any, rows: int) -> None:
        """Add every metric of the outputs and targets of `rows` rows; `ConfigError` where one is no scalar."""
        for i, (name, metric) in enumerate(self.metrics.items()):
            value = self._scalar(name, with_sums(metric, output, target))
            counts = list(counts_of(metric, target, f"metric '{name}'").values())
            self.sums[0, i] += value if counts else value * rows
            self.sums[1, i] += counts[0] if counts else rows

    @staticmethod
    def _scalar(name: str, value: Any) -> Tensor:
        if isinstance(value, Mapping) and len(value) == 1:  # a loss of one part
            (value,) = value.values()
        try:
            scalar = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(f"metric '{name}' gave {value!r}; expected a scalar") from None
        if scalar.dim():
            raise ConfigError(f"metric '{name}' gave a tensor of shape {tuple(scalar.shape)}; expected a scalar")
        return scalar.detach().double().cpu()

    def means(self) -> dict[str, float]:
        """The value of each metric over all that was added; 0, and a warning, where nothing counts."""
        found = {}
        for (name, metric), (total, weight) in zip(self.metrics.items(), self.sums.T.tolist(), strict=True):
            if weight:
                of_mean = getattr(metric, "of_mean", None)
                found[name] = of_mean(total / weight) if callable(of_mean) else total / weight
            else:
                found[name] = 0.0
                what = f"nothing in the validation data counts for metric '{name}' (all labels are ignored, say)"
                warnings.warn(f"{what}; it is given as 0", stacklevel=2)
        return found
