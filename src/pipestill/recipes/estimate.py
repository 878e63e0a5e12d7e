"""Computes what a recipe's blocks would cost on a device that is not here."""

import math
from itertools import islice
from typing import Any

import torch

from pipestill.costs import Costs
from pipestill.errors import ConfigError
from pipestill.model.estimate import Machine, estimate, task_without_memory
from pipestill.model.nests import distinct_tensors, num_rows
from pipestill.model.tasks import Task
from pipestill.recipes.recipe import Workload
from pipestill.recipes.run_options import RunOptions
from pipestill.train.data import inputs_and_targets

_BATCHES = 16  # to find a long one among


def compute(workload: Workload, machine: Machine, options: RunOptions) -> tuple[Costs, Task]:
    """Compute a pipeline's costs for one microbatch on `machine` from a batch's form; also returns the task, without weights.

    `ConfigError` for blockwise training: what they take at shares of a batch is measured.
    """
    if workload.kind == "blockwise":
        raise ConfigError(
            "--estimate computes costs of pipelines, and this recipe trains block by block; 'pipestill profile' measures it"
        )
    inputs, targets, rows = _sample(workload, options.seed)
    task = form_of(workload, machine.dtype)
    trainer = workload.trainer(task, options)
    rows = math.ceil(rows / options.microbatches)
    return estimate(task, machine, inputs, targets, rows=rows, optimizer=trainer.make_optimizer), task


def _sample(workload: Workload, seed: int) -> tuple[Any, Any, int]:
    """Take inputs and targets, always the same ones, of at least one row, and count the rows of a batch.

    Where batches differ in length, the longest one of several, which has to fit too. Else one sample: augmenting a batch of
    images takes long, and only the form of its rows counts.
    """
    loader = workload.train_loader
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if workload.length_axis is None:
            inputs, targets = inputs_and_targets(loader.collate_fn([loader.dataset[0]]))
            return inputs, targets, min(loader.batch_size or 1, len(loader.dataset))  # type: ignore[arg-type]
        batches = [inputs_and_targets(batch) for batch in islice(loader, _BATCHES)]
    inputs, targets = max(batches, key=lambda batch: sum(tensor.numel() for tensor in distinct_tensors(batch[0])))
    return inputs, targets, num_rows(inputs, "the batch's inputs")


def form_of(workload: Workload, dtype: torch.dtype = torch.float32) -> Task:
    """Build the workload's task over models without weights: its blocks and demands, at any size."""
    return task_without_memory(workload.task, dtype)
