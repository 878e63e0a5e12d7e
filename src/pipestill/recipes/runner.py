"""Trains the models of a run one after the other, each with its own metrics file, log and progress."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from pipestill.busy import Busy
from pipestill.recipes.run_options import RunOptions
from pipestill.recipes.weights import export, num_parameters
from pipestill.runtime.transport.protocol import World
from pipestill.runtime.world import choose_device_type, device_of
from pipestill.train.callbacks import Callback, JsonLines, Output, Terminal
from pipestill.train.result import Result
from pipestill.train.run_directory import RunDirectory
from pipestill.train.trainer import Trainer


class Runner:
    """Runs the trainings of one run, each with its own logs.

    Args:
        options: how the run trains
        directory: where files go; None where nothing is written, as on every process but that of rank 0
        description: what export/config.json says of the run
        quiet: show no progress on the terminal
    """

    def __init__(
        self,
        options: RunOptions,
        directory: RunDirectory | None,
        description: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        self.directory = directory
        self.description = description or {}
        self.quiet = quiet
        self.device: torch.device = device_of(
            dist.get_rank() if dist.is_initialized() else 0, choose_device_type(options.device, options.devices)
        )
        """The device of the rank that this process is."""
        self._console = Output()

    def train(
        self,
        name: str,
        make: Callable[..., Trainer],
        loader: Any,
        *,
        epochs: int,
        validate: Any = None,
        inner: str | None = None,
        exports: bool = True,
        also: Sequence[Callback] = (),
        world: World | None = None,
    ) -> Result:
        """Train one model, and write its metrics and its weights into the directory.

        Args:
            name: what the training is called on the terminal and in the log
            make: makes the trainer from `callbacks`
            loader: batches to train on
            epochs: passes over the loader
            validate: batches to validate with after every epoch
            inner: a directory inside the run's for this training's files and summary (default: the run's own directory)
            exports: write the student's weights
            also: further callbacks
            world: the ranks that train (default: all of this run)
        """
        with self._listening(name, inner) as callbacks:
            trainer = make(callbacks=[*callbacks, *also])
            result = trainer.fit(loader, epochs=epochs, validate=validate, description=name, world=world)
        if self.directory is not None:
            place = self.directory.inner(inner) if inner else self.directory
            if inner:
                place.write_json("summary.json", result.summary())
            if exports:
                export(trainer.student, place / "export" / "model.safetensors")
                if any(name in trainer.engine.trained for name in result.beside):
                    save_file(result.beside, place / "export" / "beside.safetensors")
        return result

    def write_config(self, student: nn.Module, described: Mapping[str, Any] | None = None) -> None:
        """Write export/config.json, which says what the exported student is."""
        if self.directory is not None:
            config = {**self.description, "parameters": num_parameters(student), **(described or {})}
            self.directory.write_json("export/config.json", config)

    @contextmanager
    def _listening(self, name: str, inner: str | None) -> Iterator[list[Callback]]:
        """Callbacks of one training: its metrics file, the run's log and the terminal. None without a directory."""
        if self.directory is None:
            yield []
            return
        place = self.directory.inner(inner) if inner else self.directory
        with ExitStack() as stack:
            log = stack.enter_context((self.directory / "train.log").open("a"))
            callbacks = [JsonLines(place / "metrics.jsonl"), Terminal(Console(file=log, width=120), every=1)]
            if not self.quiet:
                note = stack.enter_context(Busy(f"{name}: measuring blocks and planning"))
                callbacks += [_UntilStart(note), Terminal(self._console)]
            yield callbacks


class _UntilStart(Callback):
    """Ends a note on the terminal when the training begins."""

    def __init__(self, note: Busy) -> None:
        self.note = note

    def start(self, description: str, total_steps: int | None) -> None:
        self.note.stop()
