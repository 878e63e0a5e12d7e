"""Callbacks, which follow a run while it goes on: a metrics file, a terminal, a log, and your own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipestill.errors import PipestillError

__all__ = ["Callback", "JsonLines", "Terminal"]


class Callback:
    """Follows a run, on rank 0. Its methods do nothing: override those that you want. Steps and epochs count from 1."""

    def start(self, description: str, total_steps: int | None) -> None:
        """Training begins.

        Args:
            description: the name of the run.
            total_steps: how many steps there will be; None where the loader does not tell its length.
        """

    def notice(self, text: str) -> None:
        """Something about the run is worth knowing; called after `start`.

        Args:
            text: a line, such as the losses before the first step.
        """

    def step(self, values: dict[str, float]) -> None:
        """A step was logged.

        Args:
            values: `step`, `epoch`, `loss` and its parts, `lr`, `seconds` (a step's, on average since the last call),
                `samples_per_second`, `bubble`, and for pipelines `grad_norm`.
        """

    def validation(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """A validation is over.

        Args:
            step: the number of the step after which it was.
            epoch: the number of the epoch that it ended.
            metrics: the mean of each metric over all rows, by name.
        """

    def end(self) -> None:
        """Training ended, or failed."""


class Reporter:
    """Calls every callback of a run, and remembers the last values."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = callbacks
        self.logged: dict[str, float] = {}
        """The last logged step."""
        self.metrics: dict[str, float] = {}
        """The last logged loss, and the metrics of the last validation."""

    def start(self, description: str, total_steps: int | None) -> None:
        """Training begins."""
        for callback in self.callbacks:
            callback.start(description, total_steps)

    def notice(self, texts: Iterable[str]) -> None:
        """Pass lines on to the callbacks that have a `notice`."""
        for callback in self.callbacks:
            for text in texts if hasattr(callback, "notice") else ():
                callback.notice(text)

    def step(self, values: dict[str, float]) -> None:
        """A step was logged."""
        self.logged = values
        self.metrics["loss"] = values["loss"]
        for callback in self.callbacks:
            callback.step(values)

    def validation(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """A validation is over, after step number `step` of epoch number `epoch`, both counted from 0."""
        self.metrics.update(metrics)
        for callback in self.callbacks:
            callback.validation(step + 1, epoch + 1, metrics)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Call the `end` of all callbacks. One that fails here is reported only where the run itself has not failed."""
        failures = []
        for callback in self.callbacks:
            try:
                callback.end()
            except Exception as failure:
                failures.append(failure)
        if failures and error is None:
            raise failures[0]


class JsonLines(Callback):
    """Writes a JSON object for each logged step and for each validation to a file, a line each, as they come.

    Args:
        path: the file; what it held before is lost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def start(self, description: str, total_steps: int | None) -> None:
        self._file = self.path.open("wb", buffering=0)

    def step(self, values: dict[str, float]) -> None:
        self._write(values)

    def validation(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        self._write({"step": step, "epoch": epoch, **{f"validation_{k}": v for k, v in metrics.items()}})

    def end(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, values: dict[str, float]) -> None:
        assert self._file is not None
        line, end = (json.dumps(values) + "\n").encode(), self._file.tell()
        try:
            while line:  # a disk that is nearly full takes a part of it first
                line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(end)
            raise


class Output(Console):
    """A console on standard output that ends the run where its reader goes away (`| head`)."""

    def on_broken_pipe(self) -> None:
        raise PipestillError("nobody reads the output any more (broken pipe), so the run was ended; write it to a file")


_NARROW = 100  # columns


class Terminal(Callback):
    """Shows a progress bar on a terminal, and prints plain lines elsewhere: one for each validation, and for some steps.

    Args:
        console: where to write (`rich.console.Console`).
        every: steps from one plain line to the next.
    """

    def __init__(self, console: Console, every: int = 50) -> None:
        self.console = console
        self.every = every
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._description = ""
        self._total: int | None = None
        self._metrics = ""
        self._printed = 0

    def start(self, description: str, total_steps: int | None) -> None:
        self._description = description
        self._total = total_steps
        self._printed = 0
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                *(() if self._is_narrow() else (TimeElapsedColumn(),)), TimeRemainingColumn(),
                TextColumn("{task.fields[info]}"), console=self.console,
            )  # fmt: skip
            self._bar = self._progress.add_task(description, total=total_steps, info="")
            self._progress.start()
        else:
            self._print(f"{description}: {total_steps or 'unknown number of'} steps")

    def notice(self, text: str) -> None:
        self._print(f"{self._description}: {text}")

    def step(self, values: dict[str, float]) -> None:
        speed = f"  {values['samples_per_second']:.0f} samples/s" if self._progress is None or not self._is_narrow() else ""
        info = f"loss {values['loss']:.4f}{speed}{self._metrics}"
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=values["step"], info=info)
        elif int(values["step"]) // self.every > self._printed:  # windows of batches end at any step
            self._printed = int(values["step"]) // self.every
            self._print(f"{self._description}: step {int(values['step'])} of {self._total or '?'}  {info}")

    def validation(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        self._metrics = "".join(f"  {name} {value:.4f}" for name, value in metrics.items())
        if self._progress is None:
            self._print(f"{self._description}: epoch {epoch}{self._metrics}")

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _is_narrow(self) -> bool:
        """Whether there is no room beside the bar for what can be done without: the time until now, and the speed."""
        return self.console.width < _NARROW

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
