"""Costs of a recipe's blocks, from a file or measured here and now."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipestill.busy import Busy
from pipestill.cli.options import parse, recipe_and_rest
from pipestill.costs import Costs
from pipestill.draw.boxes import write_bytes
from pipestill.errors import ConfigError, nearest
from pipestill.model.blockwise.task import Blockwise
from pipestill.model.devices import Machine
from pipestill.model.tasks import Task
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES
from pipestill.recipes.estimate import compute, form_of
from pipestill.recipes.measure import measure
from pipestill.recipes.recipe import Recipe, Workload
from pipestill.recipes.run_options import RunOptions
from pipestill.schedule import PIPELINE_STRATEGIES
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.schedule.pipeline.structure import Demands

T = TypeVar("T")
CSV = ".csv"
_BLOCKS, _PIPELINES = "blocks that learn alone", "pipelines"


def recipe_of(
    command: str, words: Sequence[str], group: type[T], asked_for: Iterable[str] = ()
) -> tuple[Recipe, T, list[str]]:
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


def costs_of_recipe(command: str, words: Sequence[str], group: type[T]) -> tuple[Costs, Demands, T]:
    """Parse as `recipe_of` does; returns the costs of a pipeline's blocks for one microbatch, what the recipe's task asks
    of a schedule, and the group. Costs that no file gives are measured in this process alone.
    """
    recipe, options, _ = recipe_of(command, words, group)
    workload = built(recipe)
    if workload.kind == "blockwise":
        raise ConfigError(
            f"'{command} {recipe.name}' is of pipelines, and recipe '{recipe.name}' trains block by block, without one; "
            "give --costs FILE.csv (of 'pipestill profile') instead of the recipe"
        )
    split = bool(getattr(options, "split_backward", False)) or "split" in getattr(options, "strategies", "")
    how = RunOptions(microbatches=max(1, getattr(options, "microbatches", 1)), split_backward=split)
    costs, demands = costs_for(
        recipe, workload, getattr(options, "costs", None), how, getattr(options, "estimate", None)
    )
    assert isinstance(costs, Costs)
    return costs, demands, options


def costs_for(
    recipe: Recipe, workload: Workload, file: str | None, how: RunOptions, estimate: str | None = None
) -> tuple[Costs | BlockProfile, Demands]:
    """From a file, computed for a device, or measured: costs of a pipeline, or a profile where the recipe trains block by
    block; and what the recipe's task asks of a schedule.

    `ConfigError` for a file of the other kind, or of other models.
    """
    if estimate is not None:
        if file is not None:
            raise ConfigError(f"--estimate computes costs, and '{file}' has them; give one of the two")
        with Busy(f"computing costs for {estimate}"):
            computed, task = compute(workload, Machine.parse(estimate), how)
        return computed, task.demands
    if workload.kind == "blockwise":
        blocks = workload.task()
        return (measured(recipe, how) if file is None else _of_file(file, recipe, blocks)), Demands()
    form = form_of(workload)
    return (measured(recipe, how) if file is None else _of_file(file, recipe, form)), form.demands


def built(recipe: Recipe, seed: int = 0) -> Workload:
    """Build the recipe's workload, with a note for whoever waits."""
    with Busy("reading the data"):
        return recipe.workload(seed)


def measured(recipe: Recipe, how: RunOptions) -> Costs | BlockProfile:
    """Measure the recipe's blocks, with a note for whoever waits."""
    processes = "" if how.devices == 1 else f", in {how.devices} processes"
    with Busy(f"measuring the blocks of {recipe.name}{processes}"):
        return measure(recipe, how)


def _of_file(file: str, recipe: Recipe, task: Task | Blockwise) -> Costs | BlockProfile:
    """Costs from a file, of the kind and the number of blocks that the task has."""
    costs, by_blocks = load(file), isinstance(task, Blockwise)
    if by_blocks != isinstance(costs, BlockProfile):
        kind, suffix = ("block by block", CSV) if by_blocks else ("as a pipeline", ".json")
        raise ConfigError(
            f"'{file}' is of {_BLOCKS if isinstance(costs, BlockProfile) else _PIPELINES}, and recipe '{recipe.name}' is "
            f"trained {kind}; 'pipestill profile {recipe.name} -o FILE{suffix}' measures what it needs"
        )
    if isinstance(costs, BlockProfile):
        assert isinstance(task, Blockwise)
        held, wanted = f"{len(costs.blocks)} blocks", f"{task.num_blocks} blocks"
    else:
        assert not isinstance(task, Blockwise)
        held = f"{len(costs.student)} student and {len(costs.teacher)} teacher blocks"
        wanted = f"{len(task.student_blocks)} student and {len(task.teacher_blocks or ())} teacher blocks"
    if held != wanted:
        raise ConfigError(
            f"'{file}' is of {held}, the models of recipe '{recipe.name}' have {wanted}; measure them anew"
        )
    return costs


def check_strategy(name: str, costs: Costs | BlockProfile, others: Iterable[str] = ()) -> None:
    """`ConfigError` for a strategy that is not for such costs; `others` are known besides."""
    by_blocks = isinstance(costs, BlockProfile)
    names: tuple[tuple[str, ...], ...] = ((*PIPELINE_STRATEGIES, *others), tuple(BLOCKWISE_STRATEGIES))
    known, of = names[by_blocks], (_PIPELINES, _BLOCKS)
    if name in known:
        return
    if name in names[not by_blocks]:
        what = f"strategy '{name}' is of {of[not by_blocks]}, and these costs are of {of[by_blocks]}"
    else:
        what = f"no strategy '{name}'{nearest(name, known)} for {of[by_blocks]}"
    raise ConfigError(f"{what}; there are {', '.join(known)}")


def load(path: str) -> Costs | BlockProfile:
    """A profile of blocks that learn alone where the name ends in .csv, else costs of a pipeline's blocks."""
    return BlockProfile.load(path) if Path(path).suffix.lower() == CSV else Costs.load(path)


def writable(path: str | None) -> None:
    """`ConfigError` when there is no directory to write `path` into: seen before minutes of work, not after."""
    if path is not None and not Path(path).parent.is_dir():
        raise ConfigError(f"cannot write '{path}': there is no directory '{Path(path).parent}'")


def drawable(path: str | None) -> None:
    """`ConfigError` when `path` cannot become a picture: seen before minutes of work too."""
    if path is not None and Path(path).suffix.lower() not in (".svg", ".png"):
        raise ConfigError(f"cannot draw '{path}': the name must end in .svg or .png")
    writable(path)


def write_json(path: str, value: Any) -> None:
    """One file in one go."""
    write_bytes(Path(path), (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
