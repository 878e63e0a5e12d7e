"""Runs a recipe: teacher once, the distilled student, and the same student without a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from pipestill import draw
from pipestill.callbacks import Callback, JsonLines, Terminal
from pipestill.costs import Costs
from pipestill.errors import ConfigError
from pipestill.model.tasks import Distillation, Supervised, Task
from pipestill.recipes.recipe import AnyWorkload, MomentumWorkload, Recipe, Training, Workload
from pipestill.run_directory import RunDirectory
from pipestill.runtime.rank import Tally
from pipestill.runtime.world import in_main_process
from pipestill.train import Result, Trainer


class Numbers(tuple[int, ...]):
    """Whole numbers that are written 2,1,3 on the command line and [2, 1, 3] in YAML."""

    __slots__ = ()


@dataclass(frozen=True)
class RunOptions:
    """How a recipe is run.

    Args:
        devices: pipeline stages, each one process with one device
        strategy: reference, sequential, gpipe, 1f1b, tspipe, async or fill
        microbatches: slices of a batch whose gradients add up
        staleness: of a momentum teacher under 'fill': 0 is exact, with 1 it is one step old (default: 0)
        split_backward: 'fill' takes gradients of weights apart from those of inputs, and fills bubbles with them
        stash: most microbatches that a rank of 'fill' holds between forward and backward: a number, n (as many as
            stages), 2n-1 or all (default: n, and 2n-1 with split backwards)
        clip_grad_norm: largest norm of all gradients together (default: no limit)
        batch_norm: running statistics move with each microbatch, once a batch (deferred), or not at all (frozen)
        run_ahead: most microbatches that the teacher of 'fill' may be ahead of the student (default: as needed)
        student_partition: blocks of each student stage, such as 3,3 (default: levelled from measured costs)
        teacher_partition: blocks of each teacher stage
        costs: a costs file to plan with, instead of measuring
        teacher: a teacher's model.safetensors of an earlier run, instead of training one
        device: cpu or cuda (default: cuda where there are enough)
        seed: of the initial weights, the data's order and dropout
        log_every: steps between two lines of metrics.jsonl
        threads: CPU threads of each process (default: the cores shared out evenly)
        timeout_seconds: deadline of every wait
    """

    devices: int = 1
    strategy: str = "fill"
    microbatches: int = 8
    staleness: int | None = None
    split_backward: bool = False
    stash: int | str | None = None
    clip_grad_norm: float | None = None
    batch_norm: Literal["microbatch", "deferred", "frozen"] = "microbatch"
    run_ahead: int | None = None
    student_partition: Numbers | None = None
    teacher_partition: Numbers | None = None
    costs: str | None = None
    teacher: str | None = None
    device: str | None = None
    seed: int = 0
    log_every: int = 10
    threads: int | None = None
    timeout_seconds: float = 600.0


def make_trainer(
    task: Task, workload: AnyWorkload, training: Training, options: RunOptions, callbacks: Sequence[Callback] = ()
) -> Trainer:
    """The trainer of one phase. Given partitions and costs belong to the distillation, so others are levelled anew."""
    distils = not isinstance(task, Supervised)
    strategy = options.strategy
    if not distils and strategy in ("tspipe", "async"):
        strategy = "1f1b"  # without a teacher, that is what is left of them
    return Trainer(
        task, optimizer=training.optimizer, lr=training.lr, optimizer_options=training.optimizer_options,
        lr_schedule=training.factor(workload.train_loader), devices=options.devices, strategy=strategy,
        microbatches=options.microbatches, run_ahead=options.run_ahead if distils else None,
        staleness=options.staleness if distils else None, split_backward=options.split_backward, stash=options.stash,
        clip_grad_norm=options.clip_grad_norm, batch_norm=options.batch_norm,
        student_partition=options.student_partition if distils else None,
        teacher_partition=options.teacher_partition if distils else None,
        costs=Costs.load(options.costs) if options.costs and distils else None, device=options.device,
        metrics=workload.metrics, seed=options.seed, log_every=options.log_every, callbacks=callbacks,
        timeout_seconds=options.timeout_seconds,
    )  # fmt: skip


def preflight(recipe: Recipe, options: RunOptions) -> None:
    """Everything that can be seen to be wrong before anything is trained: options, partitions, models, loss, files."""
    workload = recipe.workload(options.seed)
    task = workload.task()
    make_trainer(task, workload, workload.student_training, options).preflight(workload.train_loader)
    if options.teacher is not None:
        if isinstance(workload, MomentumWorkload):
            raise ConfigError(f"recipe '{recipe.name}' makes its own teacher out of the student; leave out --teacher")
        assert isinstance(task, Distillation)
        load_into(task.teacher, Path(options.teacher))


def run_recipe(
    recipe: Recipe, options: RunOptions, directory: RunDirectory | None, quiet: bool = False
) -> dict[str, Any]:
    """Train what the recipe says, on every rank of the world that this process is in; returns the summary on rank 0.

    Only rank 0 writes to `directory`; the others return {}, and may have None.
    """
    workload = recipe.workload(options.seed)
    directory = directory if in_main_process() else None
    runner = _Runner(workload, options, directory, quiet)
    if isinstance(workload, MomentumWorkload):
        main, student, metrics = _run_momentum(workload, runner)
    else:
        main, student, metrics = _run_distillation(workload, options, runner)
    if directory is None:
        return {}
    summary = {"recipe": recipe.name, **main.summary(), "metrics": metrics}
    save(main, directory, student, {"recipe": recipe.name, "options": dataclasses.asdict(recipe)})  # type: ignore[call-overload]
    directory.write_json("summary.json", summary)
    return summary


def _run_distillation(
    workload: Workload, options: RunOptions, runner: _Runner
) -> tuple[Result, nn.Module, dict[str, Any]]:
    """Teacher once (its weights stay in teacher/export, and can be given to the next run), student, student alone."""
    teacher, student, alone = workload.build_teacher(), workload.build_student(), workload.build_student()
    taught: dict[str, Any] = {"read_from": options.teacher}
    if options.teacher is not None:
        load_into(teacher, Path(options.teacher))
        taught.update(evaluate(teacher, workload))
    else:
        task = Supervised(teacher, workload.supervised_loss)
        taught = runner.phase("teacher", task, workload.teacher_training, "teacher").metrics
    main = runner.phase("student", Distillation(teacher, student, workload.loss), workload.student_training, None)
    lone = runner.phase(
        "student alone", Supervised(alone, workload.supervised_loss), workload.student_training, "student_alone"
    )
    parameters = {"student": _count(student), "teacher": _count(teacher)}
    return main, student, {
        "student": main.metrics, "teacher": taught, "student_alone": lone.metrics, "parameters": parameters,
    }  # fmt: skip


def _run_momentum(workload: MomentumWorkload, runner: _Runner) -> tuple[Result, nn.Module, dict[str, Any]]:
    """Student and teacher together; what the teacher has learnt, beside the same network untrained."""
    task = workload.task()
    before = workload.evaluate(task.teacher)
    main = runner.phase("student", task, workload.student_training, None)
    if runner.directory is not None:
        export(task.teacher, runner.directory / "export" / "teacher.safetensors")
    return main, task.student, {
        "student": main.metrics, "teacher": workload.evaluate(task.teacher), "untrained": before,
        "parameters": {"student": _count(task.student), "teacher": _count(task.teacher)},
    }  # fmt: skip


class _Runner:
    """Runs phases one after the other, each with its own logs."""

    def __init__(self, workload: AnyWorkload, options: RunOptions, directory: RunDirectory | None, quiet: bool) -> None:
        self.workload, self.options, self.directory, self.quiet = workload, options, directory, quiet
        self.console = Console()

    def phase(self, name: str, task: Task, training: Training, inner: str | None) -> Result:
        """Train one model; its metrics go to the directory itself, or to one inside it."""
        if self.directory is None:
            return self._fit(name, task, training, [])
        place = self.directory.inner(inner) if inner else self.directory
        with (self.directory / "train.log").open("a") as log:
            callbacks = [JsonLines(place / "metrics.jsonl"), Terminal(Console(file=log, width=120), every=1)]
            if not self.quiet:
                callbacks.append(Terminal(self.console))
            result = self._fit(name, task, training, callbacks)
        if inner:
            place.write_json("summary.json", result.summary())
        export(task.student, place / "export" / "model.safetensors")
        return result

    def _fit(self, name: str, task: Task, training: Training, callbacks: Sequence[Callback]) -> Result:
        trainer = make_trainer(task, self.workload, training, self.options, callbacks)
        return trainer.fit(
            self.workload.train_loader,
            epochs=training.epochs,
            validate=self.workload.validation_loader if isinstance(self.workload, Workload) else None,
            description=name,
        )


def save(result: Result, directory: RunDirectory, student: nn.Module, config: dict[str, Any]) -> None:
    """Write plan, timeline, trace and the student's description."""
    directory.write_json("export/config.json", {**config, "parameters": _count(student)})
    if result.plan is None or result.trace is None:
        return
    directory.write_json("plan.json", result.plan.to_json())
    draw.write_chrome_trace(result.trace, directory / "trace.json.gz")
    title = f"{result.strategy} on {result.devices} {'device' if result.devices == 1 else 'devices'}"
    draw.picture(
        [result.plan.prediction, result.trace], directory / "timeline.svg",
        titles=[f"{title}, predicted", f"{title}, measured"],
    )  # fmt: skip


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
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"cannot read weights from '{path}': {error}") from None
    tied = {n for n, p in model.state_dict(keep_vars=True).items() if n in missing and _is_tied(model, n)}
    if unexpected or set(missing) - tied:
        raise ConfigError(f"'{path}' holds another model: missing {missing[:3]}, unexpected {unexpected[:3]}")


def _is_tied(model: nn.Module, name: str) -> bool:
    state = model.state_dict(keep_vars=True)
    return any(other is state[name] for key, other in state.items() if key != name)


def evaluate(model: nn.Module, workload: Workload) -> dict[str, float]:
    """The workload's metrics of a model on its validation data."""
    tally = Tally(workload.metrics)
    model.eval()
    with torch.no_grad():
        for inputs, targets in workload.validation_loader:
            tally.add(model(inputs), targets, len(targets))
    return tally.means()


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
