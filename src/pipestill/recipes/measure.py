"""Measures what a recipe's blocks cost, over as many processes as it is to be planned for."""

from __future__ import annotations

import dataclasses

import torch

from pipestill.costs import Costs
from pipestill.recipes.recipe import BlockwiseWorkload, Recipe
from pipestill.recipes.run_blockwise import make_block_trainer
from pipestill.recipes.run_options import RunOptions
from pipestill.recipes.runner import make_trainer
from pipestill.runtime.launch import launch
from pipestill.runtime.world import choose_device_type
from pipestill.schedule.blockwise.profile import BlockProfile


def measure(recipe: Recipe, options: RunOptions) -> Costs | BlockProfile:
    """Costs of a pipeline's blocks for one microbatch, or a profile of blocks that learn alone, on real data.

    One device is this process. With more, each is a process: rank 0 measures blocks while the others wait, and links and
    neighbours are measured by all of them, as before a run. `options.split_backward` finds out what the gradients of the
    weights take by themselves.
    """
    device_type = choose_device_type(options.device, options.devices)
    if options.devices == 1:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        return _measure(recipe, options)
    measured: Costs | BlockProfile = launch(
        _measure, (recipe, options), options.devices, device_type=device_type, threads=options.threads,
        timeout_seconds=options.timeout_seconds,
    )  # fmt: skip
    return measured


def _measure(recipe: Recipe, options: RunOptions) -> Costs | BlockProfile:
    """On every rank; the same everywhere."""
    workload = recipe.workload(options.seed)
    if isinstance(workload, BlockwiseWorkload):
        trainer = make_block_trainer(workload.task(), workload, dataclasses.replace(options, strategy="balanced"))
        return trainer.measure(workload.train_loader)
    trainer = make_trainer(workload.task(), workload, workload.student_training, options)
    return trainer.measure(workload.train_loader)
