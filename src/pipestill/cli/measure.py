"""Costs of a recipe's blocks, from a file or measured here and now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from pipestill.cli.options import parse, recipe_and_rest
from pipestill.costs import Costs
from pipestill.model.boundary import num_rows
from pipestill.model.dry_run import dry_run
from pipestill.model.profile import profile
from pipestill.recipes.recipe import Recipe
from pipestill.schedule.program import Demands

T = TypeVar("T")


def costs_of_recipe(command: str, words: Sequence[str], group: type[T]) -> tuple[Costs, Demands, T]:
    """Parse `RECIPE --KEY VALUE ...` with the keys of `group` too; returns the recipe's costs, what its task asks of a
    schedule, and the group.
    """
    kind, defaults, rest = recipe_and_rest(command, words)
    recipe, options = parse(f"{command} {kind.name}", rest, kind, group, defaults=defaults)
    file: str | None = getattr(options, "costs", None)
    demands = recipe.workload(0).task().demands
    if file is not None:
        return Costs.load(file), demands, options
    split = bool(getattr(options, "split_backward", False)) or "split" in getattr(options, "strategies", "")
    return measure(recipe, max(1, getattr(options, "microbatches", 1)), split=split), demands, options


def measure(recipe: Recipe, microbatches: int, seed: int = 0, *, split: bool = False) -> Costs:
    """Median seconds of every block of the recipe's models for one microbatch, in this process alone."""
    workload = recipe.workload(seed)
    task = workload.task()
    inputs, targets = next(iter(workload.train_loader))
    contracts = dry_run(task, inputs, targets, split=split)
    training = workload.student_training

    def optimizer(parameters: dict[str, Any]) -> Any:
        return training.make_optimizer(list(parameters.values()))

    batch_size = workload.train_loader.batch_size or num_rows(inputs, "the batch's inputs")
    rows = math.ceil(batch_size / microbatches)
    return profile(task, contracts, inputs, targets, rows=rows, optimizer=optimizer, split=split)
