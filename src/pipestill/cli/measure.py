"""Costs of a recipe's blocks, from a file or measured here and now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from pipestill.cli.options import parse, recipe_and_rest
from pipestill.costs import Costs
from pipestill.model.dry_run import dry_run
from pipestill.model.profile import profile
from pipestill.model.tasks import Distillation
from pipestill.recipes.recipe import Recipe

T = TypeVar("T")


def costs_of_recipe(command: str, words: Sequence[str], group: type[T]) -> tuple[Costs, T]:
    """Parse `RECIPE --KEY VALUE ...` with the keys of `group` too; returns the recipe's costs and the group."""
    kind, defaults, rest = recipe_and_rest(command, words)
    recipe, options = parse(f"{command} {kind.name}", rest, kind, group, defaults=defaults)
    file: str | None = getattr(options, "costs", None)
    if file is not None:
        return Costs.load(file), options
    return measure(recipe, max(1, getattr(options, "microbatches", 1))), options


def measure(recipe: Recipe, microbatches: int, seed: int = 0) -> Costs:
    """Median seconds of every block of the recipe's models for one microbatch, in this process alone."""
    workload = recipe.workload(seed)
    task = Distillation(workload.build_teacher(), workload.build_student(), workload.loss)
    inputs, targets = next(iter(workload.train_loader))
    contracts = dry_run(task, inputs, targets)
    training = workload.student_training

    def optimizer(parameters: dict[str, Any]) -> Any:
        return training.make_optimizer(list(parameters.values()))

    rows = math.ceil((workload.train_loader.batch_size or len(targets)) / microbatches)
    return profile(task, contracts, inputs, targets, rows=rows, optimizer=optimizer)
