"""Runs a workload under a strategy and as the plain loop, and compares every weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from pipestill.recipes.recipe import Recipe
from pipestill.recipes.run_options import RunOptions
from pipestill.runtime.launch import launch
from pipestill.train.result import Result

TRANSPORTS = ("in-process", "process-group")


def verify(
    recipe: Recipe, options: RunOptions, *, steps: int, transports: tuple[str, ...], device_type: str
) -> dict[str, Any]:
    """Train the recipe's task under `options` and as `reference`, with a short last batch in every epoch.

    Compares all weights and buffers of student and teacher bit by bit over each of `transports`; returns what `pipestill
    check --json` prints. Where a schedule declares stale weights, the reference keeps copies of the old ones and reads
    those (PAPERS.md, section 1.1).
    """
    largest = 0.0
    versions: list[dict[str, Any]] = []
    problems = []
    expected: dict[str, Tensor] = {}
    for transport in transports:
        if transport == "process-group" and options.devices > 1:
            got, result = launch(
                train_few, (recipe, options, steps), options.devices, device_type=device_type, threads=1,
                timeout_seconds=options.timeout_seconds,
            )  # fmt: skip
        else:
            got, result = train_few(recipe, options, steps)
        expected = expected or _expected(recipe, options, steps, result)
        for name, tensor in expected.items():
            if not torch.equal(tensor, got[name]):
                difference = float((tensor.double() - got[name].double()).abs().max())
                largest = max(largest, difference)
                problems.append(f"{transport}: '{name}' differs from the reference by up to {difference:g}")
        if result.plan is not None:
            proof = result.plan.proof
            versions = [dataclasses.asdict(version) for version in proof.versions]
    return {
        "strategy": options.strategy,
        "devices": options.devices,
        "microbatches": options.microbatches,
        "steps": steps,
        "transports": list(transports),
        "exact": not problems,
        "max_abs_difference": largest,
        "staleness": result.staleness,
        "whole_backwards": list(result.whole_backwards),
        "versions": versions,
        "problems": problems,
    }


def _expected(recipe: Recipe, options: RunOptions, steps: int, result: Result) -> dict[str, Tensor]:
    """What the plain loop gives that reads the weights which the schedule of `result` declares."""
    plain = options.as_reference()
    if result.plan is None:
        return train_few(recipe, plain, steps)[0]
    structure = result.plan.schedule.structure
    plain = dataclasses.replace(plain, microbatches=structure.num_microbatches, staleness=structure.staleness or None)
    return train_few(recipe, plain, steps, structure.student_staleness)[0]


def short_epoch(batch_size: int) -> int:
    """Samples of six batches and a short one."""
    return 6 * batch_size + max(1, batch_size * 2 // 5)


def train_few(
    recipe: Recipe, options: RunOptions, steps: int, student_staleness: int = 0
) -> tuple[dict[str, Tensor], Result]:
    """Both models' state after `steps` steps from models as they are initialised, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums that are split over threads differ in their last bits
    try:
        batch_size = recipe.workload(options.seed).train_loader.batch_size or 1
        workload = recipe.workload(options.seed, short_epoch(batch_size))
        task = workload.task()
        trainer = workload.trainer(task, options, student_staleness=student_staleness)
        result = trainer.fit(workload.train_loader, steps=steps)
        state = {f"student.{name}": t.detach().clone() for name, t in task.student.state_dict().items()}
        state |= {f"teacher.{name}": t.detach().clone() for name, t in task.teacher.state_dict().items()}
        return state, result
    finally:
        torch.set_num_threads(threads)
