"""Costs that commands plan with: from a file, computed for a device, or measured here and now."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pipestill.busy import Busy
from pipestill.cli.blockwise import BlockwisePlanner, BlockwiseReport
from pipestill.cli.kinds import FOREIGN, WHAT, WHY_FOREIGN
from pipestill.cli.options import parse, recipe_and_rest, refuse
from pipestill.cli.pipelines import PipelinePlanner, PipelineReport
from pipestill.cli.without_recipe import CostsOptions, demands_of
from pipestill.costs import Costs
from pipestill.errors import ConfigError, nearest
from pipestill.plan import Plan
from pipestill.plan.blockwise.plan_json import blockwise_plan_from_json, is_blockwise_plan
from pipestill.recipes.run_options import COSTS_SUFFIXES, Kind, RunOptions, kind_of_costs, read_costs
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.schedule.pipeline.structure import Demands

if TYPE_CHECKING:
    from pipestill.recipes.recipe import Recipe, Workload

# Modules that load torch are imported inside functions, where a recipe is there: `simulate --uniform` answers at once.

T = TypeVar("T")
Planner = PipelinePlanner | BlockwisePlanner
"""Costs of either kind, with what commands do with them. Both classes have the same methods, documented at the first."""
PlanReport = PipelineReport | BlockwiseReport
"""A plan of either kind, with what commands show of it."""
_PLANNERS: dict[Kind, tuple[str, ...]] = {"pipeline": PipelinePlanner.strategies, "blockwise": BlockwisePlanner.strategies}


def recipe_of(command: str, words: Sequence[str], group: type[T], asked_for: Iterable[str] = ()) -> tuple[Recipe, T, list[str]]:
    """Parse `RECIPE|config.yaml --KEY VALUE ...` with the keys of `group` too; the words behind the recipe are the third.

    A YAML file may be that of a run: what only runs read is left unread. Keys in `asked_for` are None unless they are on
    the command line.
    """
    kind, defaults, rest = recipe_and_rest(command, words)
    known = {f.name for f in dataclasses.fields(group)}  # type: ignore[arg-type]
    known -= {"teacher"}  # which is a file of weights in a run's config
    of_runs = {f.name for f in dataclasses.fields(RunOptions)}
    defaults = {key: value for key, value in defaults.items() if key in known or key not in of_runs}
    defaults |= dict.fromkeys(asked_for)
    recipe, options = parse(f"{command} {kind.name}", rest, kind, group, defaults=defaults)
    return recipe, options, rest


def built(recipe: Recipe, seed: int = 0) -> Workload:
    """Build the recipe's workload, with a note for whoever waits."""
    with Busy("reading the data"):
        return recipe.workload(seed)


def planner_of(costs: Costs | BlockProfile, demands: Demands | None = None, batch: int | None = None) -> Planner:
    """Make the planner of costs of either kind.

    Args:
        costs: what is planned with
        demands: what the task asks of a pipeline's schedule (default: what a frozen teacher asks)
        batch: rows of a batch, for blocks (default: the most that was measured)
    """
    if isinstance(costs, BlockProfile):
        return BlockwisePlanner(costs, max(block.rows[-1] for block in costs.blocks) if batch is None else batch)
    return PipelinePlanner(costs, demands or Demands())


def planner_of_file(file: str, shape: CostsOptions, batch: int | None = None) -> Planner:
    """Make the planner of a file of costs without a recipe, whose task has a given shape."""
    costs = read_costs(file)
    return planner_of(costs, batch=batch) if isinstance(costs, BlockProfile) else planner_of(*demands_of(costs, shape))


def planner_of_recipe(
    recipe: Recipe, workload: Workload, file: str | None, how: RunOptions, estimate: str | None = None
) -> Planner:
    """Make the planner of a recipe's costs, which are read from a file, computed for a device, or measured.

    Raises `ConfigError` for a file of the other kind, or of other models.

    Args:
        recipe: what is planned for
        workload: what the recipe built
        file: a file of costs (default: none)
        how: how to measure
        estimate: a device to compute the costs for (default: none)
    """
    from pipestill.recipes.run import costs_of_the_other_kind

    if file is not None and estimate is not None:
        raise ConfigError(f"--estimate computes costs, and '{file}' has them; give one of the two")
    if file is not None and kind_of_costs(file) != workload.kind:
        raise ConfigError(costs_of_the_other_kind(file, recipe, workload))
    if estimate is not None:
        return _computed(workload, estimate, how)
    batch = workload.train_loader.batch_size
    demands, num_blocks = _asked(workload)
    if file is None:
        return planner_of(_measured(recipe, how), demands, batch)
    planner = planner_of(read_costs(file), demands, batch)
    if planner.num_blocks != num_blocks:
        raise ConfigError(
            f"'{file}' is of {planner.num_blocks}, the models of recipe '{recipe.name}' have {num_blocks}; measure them anew"
        )
    return planner


def _asked(workload: Workload) -> tuple[Demands, str]:
    """Find what the workload's task asks of a pipeline's schedule, and how many blocks its models have, in words."""
    if workload.kind == "blockwise":
        return Demands(), f"{workload.task().num_blocks} blocks"
    from pipestill.recipes.estimate import form_of

    form = form_of(workload)
    return form.demands, f"{len(form.student_blocks)} student and {len(form.teacher_blocks or ())} teacher blocks"


def _computed(workload: Workload, estimate: str, how: RunOptions) -> Planner:
    from pipestill.model.estimate import Machine
    from pipestill.recipes.estimate import compute

    with Busy(f"computing costs for {estimate}"):
        costs, task = compute(workload, Machine.parse(estimate), how)
    return planner_of(costs, task.demands)


def _measured(recipe: Recipe, how: RunOptions) -> Costs | BlockProfile:
    from pipestill.recipes.measure import measure

    processes = "" if how.devices == 1 else f", in {how.devices} processes"
    with Busy(f"measuring the blocks of {recipe.name}{processes}"):
        return measure(recipe, how)


def pipeline_of_recipe(command: str, words: Sequence[str], group: type[T]) -> tuple[Planner, T]:
    """Parse as `recipe_of` does, and make the planner of the recipe's pipeline, whose blocks are measured in this process."""
    recipe, options, _ = recipe_of(command, words, group)
    workload = built(recipe)
    if workload.kind != "pipeline":
        raise ConfigError(
            f"'{command} {recipe.name}' is of pipelines, and recipe '{recipe.name}' trains block by block, without one; "
            "give --costs FILE.csv (of 'pipestill profile') instead of the recipe"
        )
    knobs: Any = options
    split = "split" in knobs.strategies
    how = RunOptions(microbatches=max(1, knobs.microbatches), split_backward=split)
    return planner_of_recipe(recipe, workload, knobs.costs, how), options


def check_strategy(name: str, planner: Planner) -> None:
    """Raise `ConfigError` for a strategy that such costs are not for."""
    if name in planner.strategies:
        return
    what, there_are = WHAT[planner.kind], f"there are {', '.join(planner.strategies)}"
    for kind, names in _PLANNERS.items():
        if name in names:
            raise ConfigError(f"strategy '{name}' is of {WHAT[kind]}, and these costs are of {what}; {there_are}")
    raise ConfigError(f"no strategy '{name}'{nearest(name, planner.strategies)} for {what}; {there_are}")


def refuse_foreign(words: Sequence[str], planner: Planner) -> None:
    """Raise `ConfigError` for keys on the command line that such costs have no use for."""
    refuse(words, FOREIGN[planner.kind], WHY_FOREIGN[planner.kind])


def check_out(path: str | None, recipe: Recipe, workload: Workload) -> None:
    """Raise `ConfigError` where costs of the recipe cannot be written to a file of that name."""
    from pathlib import Path

    suffix = COSTS_SUFFIXES[workload.kind]
    if path is not None and Path(path).suffix.lower() != suffix:
        raise ConfigError(
            f"cannot write '{path}': recipe '{recipe.name}' is of {WHAT[workload.kind]}, so the name must end in {suffix}"
        )


def read_plan(text: str) -> PlanReport:
    """Read a plan's JSON, of either kind; `ConfigError` says what is wrong with it."""
    return BlockwiseReport(blockwise_plan_from_json(text)) if is_blockwise_plan(text) else PipelineReport(Plan.from_json(text))
