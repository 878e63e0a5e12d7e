"""What every recipe's run is made of: trainers, phases with their logs, files of weights, evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pipestill.costs import Costs
from pipestill.errors import ConfigError
from pipestill.model.blocks import BlockModel
from pipestill.model.nests import num_rows, to_device
from pipestill.model.tasks import Supervised, Task
from pipestill.recipes.recipe import AnyWorkload, BlockwiseWorkload, DistillationWorkload, MomentumWorkload, Training
from pipestill.recipes.run_options import RunOptions
from pipestill.recipes.standby import SignsOfLife, hand_on, say_over, stand_by
from pipestill.runtime.metrics import MetricMeans
from pipestill.runtime.world import Processes, World, choose_device_type, device_of
from pipestill.train.callbacks import Callback, JsonLines, Output, Terminal
from pipestill.train.result import Result
from pipestill.train.run_directory import RunDirectory
from pipestill.train.trainer import Trainer


def make_trainer(
    task: Task, workload: AnyWorkload, training: Training, options: RunOptions, callbacks: Sequence[Callback] = (),
    *, costs: Costs | None = None, student_staleness: int = 0,
) -> Trainer:  # fmt: skip
    """The trainer of one phase. Given partitions and costs belong to the distillation, so others are levelled anew."""
    distils = not isinstance(task, Supervised)
    strategy = options.strategy
    if not distils and strategy in ("tspipe", "async"):
        strategy = "1f1b"  # without a teacher, that is what is left of them
    return Trainer(
        task, optimizer=training.optimizer, lr=training.lr, optimizer_options=training.optimizer_options,
        param_groups=training.param_groups, lr_schedule=training.factor(workload.train_loader),
        weight_decay_schedule=training.decay_factor(workload.train_loader),
        length_axis=workload.length_axis, devices=options.devices, strategy=strategy,
        microbatches=options.microbatches, run_ahead=options.run_ahead if distils else None,
        staleness=options.staleness if distils else None, student_staleness=student_staleness,
        split_backward=options.split_backward, stash=options.stash,
        clip_grad_norm=options.clip_grad_norm, batch_norm=options.batch_norm,
        student_partition=options.student_partition if distils else None,
        teacher_partition=options.teacher_partition if distils else None,
        costs=Costs.load(options.costs) if costs is None and options.costs and distils else costs, device=options.device,
        metrics=workload.metrics, seed=options.seed, log_every=options.log_every, callbacks=callbacks,
        timeout_seconds=options.timeout_seconds,
    )  # fmt: skip


class Runner:
    """Runs phases one after the other, each with its own logs."""

    def __init__(self, workload: AnyWorkload, options: RunOptions, directory: RunDirectory | None, quiet: bool) -> None:
        self.workload, self.options, self.directory, self.quiet = workload, options, directory, quiet
        self.console = Output()

    def phase(
        self,
        name: str,
        task: Task,
        training: Training,
        inner: str | None,
        also: Sequence[Callback] = (),
        world: World | None = None,
    ) -> Result:
        """Train one model end to end; its metrics go to the directory itself, or to one inside it. `also` hear of it too."""
        with self.listening(inner) as callbacks:
            trainer = make_trainer(task, self.workload, training, self.options, [*callbacks, *also])
            result = trainer.fit(
                self.workload.train_loader,
                epochs=training.epochs,
                validate=None if isinstance(self.workload, MomentumWorkload) else self.workload.validation_loader,
                description=name,
                world=world,
            )
        if self.directory is not None:
            place = self.directory.inner(inner) if inner else self.directory
            if inner:
                place.write_json("summary.json", result.summary())
            export(task.student, place / "export" / "model.safetensors")
        return result

    def phase_of_some(self, name: str, task: Task, training: Training, inner: str) -> dict[str, float]:
        """The same where there may be more processes than `options.devices`: the others wait, and get the student.

        Returns the metrics, on rank 0.
        """
        spare = dist.is_initialized() and dist.get_world_size() > self.options.devices
        if not spare:
            return self.phase(name, task, training, inner).metrics
        metrics = dict[str, float]()
        if dist.get_rank() < self.options.devices:
            metrics = self.phase(name, task, training, inner, [SignsOfLife(name)], Processes(self.options.devices)).metrics
            if dist.get_rank() == 0:
                say_over(name)
        else:
            stand_by(name, self.options.timeout_seconds)
        hand_on(task.student_blocks)
        return metrics

    @contextmanager
    def listening(self, inner: str | None) -> Iterator[list[Callback]]:
        """Callbacks of one phase: its metrics file, the run's log and the terminal. None without a directory."""
        if self.directory is None:
            yield []
            return
        place = self.directory.inner(inner) if inner else self.directory
        with (self.directory / "train.log").open("a") as log:
            callbacks = [JsonLines(place / "metrics.jsonl"), Terminal(Console(file=log, width=120), every=1)]
            if not self.quiet:
                callbacks.append(Terminal(self.console))
            yield callbacks


def export(model: nn.Module, path: Path) -> None:
    """Write a model's state dict, under its own names, as safetensors (shared tensors once, under their first name)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: dict[int, str] = {}
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if seen.setdefault(id(tensor), name) == name
    }
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary)
    temporary.replace(path)


def load_into(model: nn.Module, path: Path) -> None:
    """Read weights that `export` wrote; `ConfigError` when they are not this model's."""
    try:
        missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ConfigError(f"cannot read weights from '{path}': {error}") from None
    tied = {n for n, p in model.state_dict(keep_vars=True).items() if n in missing and _is_tied(model, n)}
    if unexpected or set(missing) - tied:
        raise ConfigError(f"'{path}' holds another model: missing {missing[:3]}, unexpected {unexpected[:3]}")


def _is_tied(model: nn.Module, name: str) -> bool:
    state = model.state_dict(keep_vars=True)
    return any(other is state[name] for key, other in state.items() if key != name)


def evaluate(model: nn.Module, workload: DistillationWorkload | BlockwiseWorkload, device: torch.device) -> dict[str, float]:
    """The workload's metrics of a model on its validation data, computed on `device`; the model is left on the CPU.

    A model that a pipeline trains is run as its blocks, which are what is trained: they may take other inputs than `forward`.
    """
    means = MetricMeans(workload.metrics)
    model.to(device).eval()
    run = BlockModel(model) if isinstance(workload, DistillationWorkload) else model
    with torch.no_grad():
        for batch in workload.validation_loader:
            inputs, targets = to_device(tuple(batch), device)
            means.add(run(inputs), targets, num_rows(inputs, "a batch to test with"))
    model.to("cpu")
    return means.means()


def own_device(options: RunOptions) -> torch.device:
    """The device of the rank that this process is."""
    device_type = choose_device_type(options.device, options.devices)
    return device_of(dist.get_rank() if dist.is_initialized() else 0, device_type)


def num_parameters(model: nn.Module) -> int:
    """Of a model, each counted once."""
    return sum(p.numel() for p in model.parameters())
