"""Trains blocks under a strategy and each alone, and compares every weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipestill.model.batchnorm import batch_norms
from pipestill.plan.describe import describe
from pipestill.recipes.recipe import Recipe, Workload
from pipestill.recipes.run_options import RunOptions
from pipestill.runtime.launch import launch
from pipestill.runtime.world import OneProcess
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.train.blockwise import splits_rows
from pipestill.train.data import inputs_and_targets
from pipestill.verify.pipeline import short_epoch

TOLERANCE = 1e-9
"""Largest difference, relative to the largest weight of a tensor, that rounding sums of float64 in another order may make."""


def verify_blockwise(
    recipe: Recipe, options: RunOptions, *, steps: int, transports: tuple[str, ...], device_type: str
) -> dict[str, Any]:
    """Train the recipe's blocks for `steps` batches under `options` and each block alone, and compare weights and buffers.

    Bit by bit where every block sees whole batches. Where the plan lets ranks share the rows of a batch, sums are rounded
    in another order, and batch statistics are those of fewer rows: there, everything is in float64 with batch norm frozen,
    and `problems` names what differs by more than `TOLERANCE`. Returns what `pipestill check --json` prints.
    """
    workload = few_samples(recipe, options)
    task = workload.task()
    plan = workload.trainer(task, options).plan(workload.loader, world=OneProcess(options.devices))
    split = plan is not None and splits_rows(plan)
    profile = plan.costs.profile if plan else None  # measured once: all runs have the same plan
    expected = train_few_blocks(recipe, options.as_reference(), steps, None, split)
    untouched = {f"teacher.{name}": tensor for name, tensor in workload.task().teacher.state_dict().items()}
    expected |= {name: t.double() if split and t.is_floating_point() else t for name, t in untouched.items()}
    largest, largest_relative, problems = 0.0, 0.0, []
    for transport in transports:
        if transport == "process-group" and options.devices > 1:
            got = launch(
                train_few_blocks, (recipe, options, steps, profile, split), options.devices, device_type=device_type,
                threads=1, timeout_seconds=options.timeout_seconds,
            )  # fmt: skip
        else:
            got = train_few_blocks(recipe, options, steps, profile, split)
        for name, tensor in expected.items():
            if torch.equal(tensor, got[name]):
                continue
            difference = float((tensor.double() - got[name].double()).abs().max())
            relative = difference / max(float(tensor.double().abs().max()), torch.finfo(torch.float64).tiny)
            largest, largest_relative = max(largest, difference), max(largest_relative, relative)
            if not split or not relative <= TOLERANCE:
                what = "the block trained alone" if name.startswith("student.") else "what it was"
                problems.append(f"{transport}: '{name}' differs from {what} by up to {difference:g}")
    return {
        "strategy": options.strategy,
        "devices": options.devices,
        "steps": steps,
        "transports": list(transports),
        "ranks": describe(plan) if plan else [],
        "rows_split": split,
        "dtype": "float64" if split else "float32",
        "batch_norm": "frozen" if split else "as trained",
        "exact": largest == 0.0 and not problems,
        "max_abs_difference": largest,
        "max_relative_difference": largest_relative,
        "tolerance": TOLERANCE if split else 0.0,
        "staleness": 0,
        "problems": problems,
    }


def few_samples(recipe: Recipe, options: RunOptions) -> Workload:
    """The recipe's workload with a short last batch in an epoch of seven."""
    workload = recipe.workload(options.seed)
    return recipe.workload(options.seed, num_samples=short_epoch(workload.train_loader.batch_size or 1))


def train_few_blocks(
    recipe: Recipe, options: RunOptions, steps: int, profile: BlockProfile | None, split: bool
) -> dict[str, Tensor]:
    """Both models' state after `steps` batches from models as they are initialised, on one thread.

    `split`: in float64 with batch norm frozen.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums that are split over threads differ in their last bits
    try:
        workload = few_samples(recipe, options)
        task = workload.task()
        if split:
            task.teacher.double()
            task.student.double().eval()  # the change to train mode leaves frozen layers out
        trainer = workload.trainer(
            task, options, costs=profile, split_batch=in_float64 if split else inputs_and_targets
        )
        with batch_norms("frozen" if split else "microbatch", [task.student_blocks]):
            trainer.fit(workload.loader, steps=steps)
        state = {f"student.{name}": t.detach().clone() for name, t in task.student.state_dict().items()}
        return state | {f"teacher.{name}": t.detach().clone() for name, t in task.teacher.state_dict().items()}
    finally:
        torch.set_num_threads(threads)


def in_float64(item: Any) -> tuple[Any, Any]:
    """What the loader gives, with images in float64."""
    inputs, targets = inputs_and_targets(item)
    return inputs.double(), targets
