"""Checks and runs a recipe of any kind."""

import dataclasses
from typing import Any

from pipestill.arguments import raise_problems
from pipestill.errors import nearest
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES
from pipestill.recipes.recipe import Recipe, Workload
from pipestill.recipes.run_options import COSTS_SUFFIXES, RunOptions, kind_of_costs
from pipestill.recipes.runner import Runner
from pipestill.runtime.world import in_main_process
from pipestill.schedule import PIPELINE_STRATEGIES
from pipestill.train.run_directory import RunDirectory

WAYS = {"pipeline": "end to end", "blockwise": "block by block"}
"""How a recipe of each kind trains, in words."""


def preflight(recipe: Recipe, options: RunOptions) -> None:
    """Raise everything that can be seen to be wrong before anything is trained: options, partitions, models, loss, files."""
    workload = recipe.workload(options.seed)
    check_options(recipe, workload, options)
    workload.preflight(options)


def check_options(recipe: Recipe, workload: Workload, options: RunOptions) -> None:
    """Raise `ConfigError` for a strategy, a knob or a file of costs of the other kind of training."""
    name, way, problems = options.strategy, WAYS[workload.kind], []
    if name not in workload.strategies:
        what = f"no strategy '{name}'{nearest(name, workload.strategies)}"
        if name in (*PIPELINE_STRATEGIES, *BLOCKWISE_STRATEGIES):
            others = next(other for kind, other in WAYS.items() if kind != workload.kind)
            what = f"strategy '{name}' is of recipes that train {others}"
        problems.append(f"{what}; recipe '{recipe.name}' trains {way}: there are {', '.join(workload.strategies)}")
    if workload.kind == "blockwise" and options.staleness is not None:
        problems.append("staleness is of a momentum teacher, and this one is frozen; leave it out")
    if options.costs is not None and kind_of_costs(options.costs) != workload.kind:
        problems.append(costs_of_the_other_kind(options.costs, recipe, workload))
    raise_problems(problems)


def costs_of_the_other_kind(file: str, recipe: Recipe, workload: Workload) -> str:
    """Say that a file of costs is of the other kind of training, and what to do."""
    return (
        f"costs '{file}' are of models that are trained {WAYS[kind_of_costs(file)]}, and recipe '{recipe.name}' trains "
        f"{WAYS[workload.kind]}; 'pipestill profile {recipe.name} -o FILE{COSTS_SUFFIXES[workload.kind]}' measures what it needs"
    )


def run_recipe(recipe: Recipe, options: RunOptions, directory: RunDirectory | None, quiet: bool = False) -> dict[str, Any]:
    """Train what the recipe says, on every rank of the world that this process is in; returns the summary on rank 0.

    Only rank 0 writes to `directory`; the others return {}, and may have None.
    """
    workload = recipe.workload(options.seed)
    check_options(recipe, workload, options)
    directory = directory if in_main_process() else None
    description = {"recipe": recipe.name, "options": dataclasses.asdict(recipe)}  # type: ignore[call-overload]
    summary = {"recipe": recipe.name, **workload.run(options, Runner(options, directory, description, quiet))}
    if directory is None:
        return {}
    directory.write_json("summary.json", summary)
    return summary
