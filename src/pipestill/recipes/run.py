"""Runs a recipe: teacher once, the distilled student, and the same student without a teacher."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from torch import nn

from pipestill import draw
from pipestill.errors import ConfigError, nearest
from pipestill.model.tasks import Distillation, Supervised
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES
from pipestill.recipes.recipe import BlockwiseWorkload, DistillationWorkload, MomentumWorkload, Recipe, Workload
from pipestill.recipes.run_blockwise import preflight_blocks, run_blocks
from pipestill.recipes.run_options import RunOptions
from pipestill.recipes.runner import Runner, evaluate, export, load_into, make_trainer, num_parameters, own_device
from pipestill.runtime.world import in_main_process
from pipestill.schedule import PIPELINE_STRATEGIES
from pipestill.train.result import Result
from pipestill.train.run_directory import RunDirectory


def preflight(recipe: Recipe, options: RunOptions) -> None:
    """Everything that can be seen to be wrong before anything is trained: options, partitions, models, loss, files."""
    workload = recipe.workload(options.seed)
    check_strategy(recipe, workload, options)
    if isinstance(workload, BlockwiseWorkload):
        preflight_blocks(workload, options)
        return
    task = workload.task()
    make_trainer(task, workload, workload.student_training, options).preflight(workload.train_loader)
    if options.teacher is not None:
        if isinstance(workload, MomentumWorkload):
            raise ConfigError(f"recipe '{recipe.name}' makes its own teacher out of the student; leave out --teacher")
        assert isinstance(task, Distillation)
        load_into(task.teacher, Path(options.teacher))


def check_strategy(recipe: Recipe, workload: Workload, options: RunOptions) -> None:
    """`ConfigError` for a strategy, or a knob, of the other kind of training."""
    ways = {"pipeline": "end to end", "blockwise": "block by block"}
    name, way, problems = options.strategy, ways[workload.kind], []
    if name not in workload.strategies:
        what = f"no strategy '{name}'{nearest(name, workload.strategies)}"
        if name in (*PIPELINE_STRATEGIES, *BLOCKWISE_STRATEGIES):
            others = next(other for kind, other in ways.items() if kind != workload.kind)
            what = f"strategy '{name}' is of recipes that train {others}"
        problems.append(f"{what}; recipe '{recipe.name}' trains {way}: there are {', '.join(workload.strategies)}")
    if workload.kind == "blockwise" and options.staleness is not None:
        problems.append("staleness is of a momentum teacher, and this one is frozen; leave it out")
    if workload.kind == "pipeline":
        given = [key for key in ("profile", "memory") if getattr(options, key) is not None]
        problems += [f"{key} is for recipes that train block by block; leave it out" for key in given]
    if problems:
        raise ConfigError("; ".join(problems))


def run_recipe(
    recipe: Recipe, options: RunOptions, directory: RunDirectory | None, quiet: bool = False
) -> dict[str, Any]:
    """Train what the recipe says, on every rank of the world that this process is in; returns the summary on rank 0.

    Only rank 0 writes to `directory`; the others return {}, and may have None.
    """
    workload = recipe.workload(options.seed)
    check_strategy(recipe, workload, options)
    directory = directory if in_main_process() else None
    description = {"recipe": recipe.name, "options": dataclasses.asdict(recipe)}  # type: ignore[call-overload]
    if isinstance(workload, BlockwiseWorkload):
        return run_blocks(workload, options, directory, quiet, description)
    runner = Runner(workload, options, directory, quiet)
    if isinstance(workload, MomentumWorkload):
        main, student, metrics = _run_momentum(workload, options, runner)
    else:
        main, student, metrics = _run_distillation(workload, options, runner)
    if directory is None:
        return {}
    summary = {"recipe": recipe.name, **main.summary(), "metrics": metrics}
    if isinstance(workload, DistillationWorkload) and workload.teacher_origin is not None:
        summary["teacher"] = options.teacher or workload.teacher_origin
    save(main, directory, student, description)
    directory.write_json("summary.json", summary)
    return summary


def _run_distillation(
    workload: DistillationWorkload, options: RunOptions, runner: Runner
) -> tuple[Result, nn.Module, dict[str, Any]]:
    """Teacher once (its weights stay in teacher/export, and can be given to the next run), student, student alone."""
    teacher, student, alone = workload.build_teacher(), workload.build_student(), workload.build_student()
    taught: dict[str, Any]
    if options.teacher is not None or workload.teacher_origin is not None:
        if options.teacher is not None:
            load_into(teacher, Path(options.teacher))
        elif in_main_process():
            print(f"the teacher is not trained here: {workload.teacher_origin}", file=sys.stderr)
        measured = evaluate(teacher, workload, own_device(options))
        taught = {"read_from": options.teacher or workload.teacher_origin, **measured}
    else:
        task = Supervised(teacher, workload.supervised_loss)
        measured = runner.phase("teacher", task, workload.teacher_training, "teacher").metrics
        taught = dict(measured)
    main = runner.phase("student", workload.distil(teacher, student), workload.student_training, None)
    lone = runner.phase(
        "student alone", Supervised(alone, workload.supervised_loss), workload.student_training, "student_alone"
    )
    parameters = {"student": num_parameters(student), "teacher": num_parameters(teacher)}
    return main, student, {
        "student": concluded(workload, main.metrics), "teacher": {**taught, **concluded(workload, measured)},
        "student_alone": concluded(workload, lone.metrics), "parameters": parameters,
    }  # fmt: skip


def concluded(workload: DistillationWorkload, metrics: dict[str, float]) -> dict[str, float]:
    """The metrics of a model with what follows from them; those of a phase are known on rank 0 only."""
    return {**metrics, **workload.conclude(metrics)} if workload.conclude and metrics else metrics


def _run_momentum(
    workload: MomentumWorkload, options: RunOptions, runner: Runner
) -> tuple[Result, nn.Module, dict[str, Any]]:
    """Student and teacher together; what the teacher has learnt, beside the same network untrained."""
    task = workload.task()
    main = runner.phase("student", task, workload.student_training, None)
    metrics = {
        "student": main.metrics,
        "parameters": {"student": num_parameters(task.student), "teacher": num_parameters(task.teacher)},
    }
    if runner.directory is not None:
        export(task.teacher, runner.directory / "export" / "teacher.safetensors")
        device = own_device(options)
        metrics["teacher"] = workload.evaluate(task.teacher, device)
        metrics["untrained"] = workload.evaluate(workload.task().teacher, device)
    return main, task.student, metrics


def save(result: Result, directory: RunDirectory, student: nn.Module, config: dict[str, Any]) -> None:
    """Write plan, timeline, trace and the student's description."""
    directory.write_json("export/config.json", {**config, "parameters": num_parameters(student)})
    if result.plan is None or result.trace is None:
        return
    directory.write_json("plan.json", result.plan.to_json())
    draw.write_chrome_trace(result.trace, directory / "trace.json.gz")
    title = f"{result.strategy} on {result.devices} {'device' if result.devices == 1 else 'devices'}"
    draw.picture(
        [result.plan.prediction, result.trace], directory / "timeline.svg",
        titles=[f"{title}, predicted", f"{title}, measured"],
    )  # fmt: skip
