"""Measures what a recipe's blocks cost, over as many processes as it is to be planned for."""

from __future__ import annotations

import dataclasses
import math

import torch

from pipestill.costs import Costs
from pipestill.model.blockwise.dry_run import blockwise_dry_run
from pipestill.model.nests import num_rows
from pipestill.recipes.recipe import BlockwiseWorkload, Recipe
from pipestill.recipes.run_blockwise import make_block_trainer
from pipestill.recipes.run_options import RunOptions
from pipestill.recipes.runner import make_trainer
from pipestill.runtime.launch import launch
from pipestill.runtime.world import choose_device_type, join_world
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.train.data import inputs_and_targets


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
    world = join_world(options.devices, choose_device_type(options.device, options.devices), options.timeout_seconds)
    inputs, targets = inputs_and_targets(next(iter(workload.train_loader)))
    rows = num_rows(inputs, "the batch's inputs")
    if isinstance(workload, BlockwiseWorkload):
        task = workload.task()
        by_blocks = make_block_trainer(task, workload, dataclasses.replace(options, strategy="balanced"))
        return by_blocks.measure(world, blockwise_dry_run(task, inputs), inputs, rows)
    trainer = make_trainer(workload.task(), workload, workload.student_training, options)
    contracts = trainer.dry_run(inputs, targets)
    return trainer.measure(world, contracts, (inputs, targets), math.ceil(rows / options.microbatches))
