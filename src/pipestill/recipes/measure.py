"""Measures what a recipe's blocks cost, over as many processes as it is to be planned for."""

import torch

from pipestill.costs import Costs
from pipestill.recipes.recipe import Recipe
from pipestill.recipes.run_options import RunOptions
from pipestill.runtime.launch import launch
from pipestill.runtime.world import choose_device_type
from pipestill.schedule.blockwise.profile import BlockProfile


def measure(recipe: Recipe, options: RunOptions) -> Costs | BlockProfile:
    """Measure costs of a pipeline's blocks for one microbatch, or a profile for blockwise training, on real data.

    One device is this process. With more, each is a process: rank 0 measures blocks while the others wait, and then all of them
    measure the links, and how much they slow each other down, as before a run. With `options.split_backward`, the gradients of
    the weights are measured by themselves too.
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
    """Measure on every rank; the result is the same on all of them."""
    workload = recipe.workload(options.seed)
    trainer = workload.trainer(workload.task(), options, strategy=None, memory=None)
    return trainer.measure(workload.train_loader)
