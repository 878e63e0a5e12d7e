"""Runs a workload under a strategy and as the plain loop, and compares every weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from pipestill.model.tasks import Distillation
from pipestill.recipes.recipe import Recipe
from pipestill.recipes.run import RunOptions, make_trainer
from pipestill.runtime.launch import launch
from pipestill.schedule import check
from pipestill.train import REFERENCE, Result

TRANSPORTS = ("in-process", "process-group")


def verify(
    recipe: Recipe, options: RunOptions, *, steps: int, transports: tuple[str, ...], device_type: str
) -> dict[str, Any]:
    """Train the recipe's student under `options` and as `reference`, with a short last batch in every epoch.

    Compares all weights and buffers bit by bit over each of `transports`; returns what `pipestill check --json` prints.
    """
    expected, _ = train_few(recipe, reference_options(options), steps)
    largest = 0.0
    versions: list[dict[str, Any]] = []
    problems = []
    for transport in transports:
        if transport == "process-group" and options.devices > 1:
            got, result = launch(
                train_few, (recipe, options, steps), options.devices, device_type=device_type, threads=1,
                timeout_seconds=options.timeout_seconds,
            )  # fmt: skip
        else:
            got, result = train_few(recipe, options, steps)
        for name, tensor in expected.items():
            if not torch.equal(tensor, got[name]):
                difference = float((tensor.double() - got[name].double()).abs().max())
                largest = max(largest, difference)
                problems.append(f"{transport}: '{name}' differs from the reference by up to {difference:g}")
        if result.plan is not None:
            proof = check(result.plan.schedule)
            versions = [dataclasses.asdict(version) for version in proof.versions]
    return {
        "strategy": options.strategy,
        "devices": options.devices,
        "microbatches": options.microbatches,
        "steps": steps,
        "transports": list(transports),
        "exact": not problems,
        "max_abs_difference": largest,
        "versions": versions,
        "problems": problems,
    }


def reference_options(options: RunOptions) -> RunOptions:
    """The same training as a plain loop on one device."""
    return dataclasses.replace(
        options,
        strategy=REFERENCE,
        devices=1,
        run_ahead=None,
        student_partition=None,
        teacher_partition=None,
        costs=None,
    )


def train_few(recipe: Recipe, options: RunOptions, steps: int) -> tuple[dict[str, Tensor], Result]:
    """The student's state after `steps` steps of distillation from a teacher as it is initialised, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums that are split over threads differ in their last bits
    try:
        batch_size = recipe.workload(options.seed).train_loader.batch_size or 1
        workload = recipe.workload(options.seed, num_samples=6 * batch_size + max(1, batch_size * 2 // 5))
        task = Distillation(workload.build_teacher(), workload.build_student(), workload.loss)
        trainer = make_trainer(task, workload, workload.student_training, options)
        result = trainer.fit(workload.train_loader, steps=steps)
        return {name: t.detach().clone() for name, t in task.student.state_dict().items()}, result
    finally:
        torch.set_num_threads(threads)
