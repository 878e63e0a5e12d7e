"""Runs a recipe that trains block by block: teacher, blocks, the student end to end, and the student without a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pipestill import draw
from pipestill.model.blocks import BlockModel
from pipestill.model.blockwise.task import Blockwise
from pipestill.model.tasks import Distillation, Supervised
from pipestill.plan.blockwise.json import blockwise_plan_to_json
from pipestill.plan.blockwise.plan import BlockwisePlan
from pipestill.plan.describe import phase_titles
from pipestill.recipes.recipe import BlockwiseWorkload
from pipestill.recipes.run_options import RunOptions
from pipestill.recipes.runner import (
    Runner,
    evaluate,
    export,
    load_into,
    make_trainer,
    num_parameters,
    own_device,
)
from pipestill.runtime.world import OneProcess
from pipestill.schedule import Trace
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.train.callbacks import Callback
from pipestill.train.data import SplitBatch, inputs_and_targets
from pipestill.train.engine import REFERENCE
from pipestill.train.result import Result
from pipestill.train.run_directory import RunDirectory
from pipestill.train.trainer import Trainer


def make_block_trainer(
    task: Blockwise,
    workload: BlockwiseWorkload,
    options: RunOptions,
    callbacks: Sequence[Callback] = (),
    profile: BlockProfile | None = None,
    split_batch: SplitBatch = inputs_and_targets,
) -> Trainer:
    """The trainer of the blocks; `profile` replaces the one that the options name."""
    training = workload.student_training
    if profile is None and options.profile is not None:
        profile = BlockProfile.load(options.profile)
    return Trainer(
        task, optimizer=training.optimizer, lr=training.lr, optimizer_options=training.optimizer_options,
        param_groups=training.param_groups, lr_schedule=training.factor(workload.loader),
        devices=options.devices, strategy=options.strategy, costs=profile, memory=options.memory, split_batch=split_batch,
        device=options.device, seed=options.seed, log_every=options.log_every, callbacks=callbacks,
        timeout_seconds=options.timeout_seconds,
    )  # fmt: skip


def end_to_end(options: RunOptions, *models: nn.Module) -> RunOptions:
    """How whole models are trained where blocks are trained by `options.strategy`: at most a stage for each of their blocks."""
    stages = min(options.devices, *(len(BlockModel(model)) for model in models))
    return dataclasses.replace(options, strategy=REFERENCE if options.strategy == REFERENCE else "fill", devices=stages)


def preflight_blocks(workload: BlockwiseWorkload, options: RunOptions) -> None:
    """Everything that can be seen to be wrong before anything is trained. With a limit of memory, blocks are measured here."""
    task = workload.task()
    if options.memory is not None and options.profile is None:
        plan_of(task, workload, options)
    else:
        make_block_trainer(task, workload, options).preflight(workload.loader)
    network = workload.derive(task) if workload.derive else task.student
    whole = end_to_end(options, task.teacher, network)
    if workload.fine_tuning is not None and workload.fine_tuning_loss is not None:
        tuned = Distillation(task.teacher, network, workload.fine_tuning_loss)
        make_trainer(tuned, workload, workload.fine_tuning, whole).preflight(workload.train_loader)
    for model, training in ((task.teacher, workload.teacher_training), (network, workload.alone_training)):
        alone = Supervised(model, workload.supervised_loss)
        make_trainer(alone, workload, training, whole).preflight(workload.train_loader)
    if options.teacher is not None:
        load_into(task.teacher, Path(options.teacher))


def plan_of(task: Blockwise, workload: BlockwiseWorkload, options: RunOptions) -> BlockwisePlan | None:
    """The plan for the workload's batches, from the profile that the options name or from one measured in this process.

    None for `reference`, which needs none.
    """
    trainer = make_block_trainer(task, workload, options)
    plan: BlockwisePlan | None = trainer.plan(workload.loader, world=OneProcess(options.devices))
    return plan


def run_blocks(
    workload: BlockwiseWorkload,
    options: RunOptions,
    directory: RunDirectory | None,
    quiet: bool,
    description: dict[str, Any],
) -> dict[str, Any]:
    """All phases, on every rank; returns the summary on rank 0, and {} elsewhere."""
    task, device = workload.task(), own_device(options)
    runner = Runner(workload, end_to_end(options, task.teacher), directory, quiet)
    taught: dict[str, Any] = {"read_from": options.teacher}
    if options.teacher is not None:
        load_into(task.teacher, Path(options.teacher))
        taught |= evaluate(task.teacher, workload, device)
    else:
        teacher = Supervised(task.teacher, workload.supervised_loss)
        taught = runner.phase_of_some("teacher", teacher, workload.teacher_training, "teacher")
    with runner.listening(None) as callbacks:
        trainer = make_block_trainer(task, workload, options, callbacks)
        blocks = trainer.fit(workload.loader, epochs=workload.student_training.epochs, description="blocks")
    student = workload.derive(task) if workload.derive else task.student
    runner.options = end_to_end(options, task.teacher, student)
    metrics: dict[str, Any] = {"teacher": taught, "blocks": evaluate(student, workload, device)}
    metrics["student"] = metrics["blocks"]
    for name, models in (workload.rivals(task) if workload.rivals else {}).items():
        several = [evaluate(model, workload, device) for model in models]
        metrics[name] = {key: sum(figures[key] for figures in several) / len(several) for key in several[0]}
    described = workload.describe(task, student) if workload.describe else {}
    if directory is not None:
        save_blocks(blocks, directory, options)
        export(student, directory / "export" / "model.safetensors")
    if workload.fine_tuning is not None and workload.fine_tuning_loss is not None:
        if directory is not None:
            export(student, directory / "export" / "before_fine_tuning.safetensors")
        tuned = Distillation(task.teacher, student, workload.fine_tuning_loss)
        metrics["student"] = runner.phase_of_some("fine-tuning", tuned, workload.fine_tuning, "fine_tuning")
    alone = workload.fresh(student) if workload.fresh else workload.task().student
    lone = Supervised(alone, workload.supervised_loss)
    metrics["student_alone"] = runner.phase_of_some("student alone", lone, workload.alone_training, "student_alone")
    metrics["parameters"] = {"student": num_parameters(student), "teacher": num_parameters(task.teacher)}
    if directory is None:
        return {}
    export(student, directory / "export" / "model.safetensors")
    directory.write_json("export/config.json", {**description, "parameters": num_parameters(student), **described})
    summary = {"recipe": description["recipe"], **summary_of(blocks), "metrics": metrics, **described}
    directory.write_json("summary.json", summary)
    return summary


def summary_of(result: Result) -> dict[str, Any]:
    """A result under the names of summary.json, where a step is an update of every block, from one batch."""
    values = result.summary()
    values["block_losses"] = values.pop("losses")
    return values


def save_blocks(result: Result, directory: RunDirectory, options: RunOptions) -> None:
    """Write plan, timeline and traces of the blocks' training."""
    if result.plan is None:
        return
    directory.write_json("plan.json", blockwise_plan_to_json(result.plan, options.memory))
    for name, trace in zip(trace_names(len(result.traces)), result.traces, strict=True):
        draw.write_chrome_trace(trace, directory / name)
    draw_blocks(result.plan, result.traces, directory / "timeline.svg")


def trace_names(num_phases: int) -> list[str]:
    """Files of the traces: one, or one for each phase."""
    return [f"trace{'' if num_phases == 1 else f'-{number}'}.json.gz" for number in range(num_phases)]


def draw_blocks(plan: BlockwisePlan, traces: Sequence[Trace], path: Path, num_steps: int | None = None) -> None:
    """What was predicted above what happened; of several phases, what happened in each. `num_steps` are of the schedule; by
    default, two where a step is a batch, else one.
    """
    titles, steps = phase_titles(plan), num_steps or (1 if plan.window > 1 else 2)
    if len(traces) == 1:
        traces, titles = [plan.predictions[0], *traces], [f"{titles[0]}, predicted", f"{titles[0]}, measured"]
    draw.picture(traces, path, titles=titles, num_steps=steps)
