"""What a run did, and what trainers of both kinds have in common."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from pipestill.plan import Plan
from pipestill.runtime.batch import Batch
from pipestill.schedule import Trace
from pipestill.train.callbacks import Callback

REFERENCE = "reference"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Result:
    """What a run did. Complete on the process of rank 0 only; `plan` and `trace` are None for `reference`."""

    strategy: str
    devices: int
    backend: str
    steps: int
    samples: int
    seconds: float
    seconds_per_step: float
    utilisation: float
    bubble: float
    predicted_seconds_per_step: float | None
    limit_seconds_per_step: float | None
    staleness: int
    peak_memory_bytes: list[int]
    metrics: dict[str, float]
    whole_backwards: tuple[str, ...] = ()
    """Blocks whose backward stayed whole where `split_backward` was asked for, and why."""
    plan: Plan | None = field(repr=False, default=None)
    trace: Trace | None = field(repr=False, default=None)

    def summary(self) -> dict[str, Any]:
        """What summary.json holds, apart from the recipe's name."""
        values = {name: value for name, value in vars(self).items() if name not in ("plan", "trace")}
        exact = True if not self.staleness else f"no: each step reads weights that are {self.staleness} step old"
        return {**values, "samples_per_second": self.samples / self.seconds, "exact": exact, "versions": versions()}


class Reporter:
    """Tells every callback, and remembers the last metrics."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = callbacks
        self.metrics: dict[str, float] = {}

    def step(self, values: dict[str, float]) -> None:
        self.metrics["loss"] = values["loss"]
        for callback in self.callbacks:
            callback.step(values)

    def validation(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        self.metrics.update(metrics)
        for callback in self.callbacks:
            callback.validation(step, epoch, metrics)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Tell all of them of the end. Where the run has failed, what fails here is no news: a log on a disk that is full."""
        failures = []
        for callback in self.callbacks:
            try:
                callback.end()
            except Exception as failure:
                failures.append(failure)
        if failures and error is None:
            raise failures[0]


class Counted:
    """Counts the batches and samples that pass."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches, self.steps, self.samples = batches, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self.batches)
        self.steps += 1
        self.samples += batch.rows
        return batch


def versions() -> dict[str, str]:
    """Of what a run's results depend on."""
    return {"pipestill": version("pipestill"), "torch": torch.__version__, "python": platform.python_version()}


def total_steps(loader: Iterable[Any], epochs: int | None, steps: int | None) -> int | None:
    """How many steps a run has, where that can be known beforehand."""
    if epochs is None:
        return steps
    try:
        length = len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader over an IterableDataset has a __len__ that refuses
        length = None
    return None if length is None else min(epochs * length, steps or epochs * length)
