"""`pipestill simulate PLAN|RECIPE ...` or `--uniform T,F,BI,BW`: time a schedule without running it."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipestill import draw
from pipestill.cli.costs import (
    Planner,
    PlanReport,
    built,
    check_strategy,
    planner_of,
    planner_of_file,
    planner_of_recipe,
    read_plan,
    recipe_of,
    refuse_foreign,
)
from pipestill.cli.files import check_drawable
from pipestill.cli.kinds import FOREIGN, OF_TASKS
from pipestill.cli.options import parse, refuse
from pipestill.cli.without_recipe import SimulateOptions, demands_of, uniform
from pipestill.errors import ConfigError
from pipestill.recipes.run_options import RunOptions

_FIXED = ("devices", "strategy", "costs", "estimate", "memory", *FOREIGN["blockwise"], *FOREIGN["pipeline"])


def run(words: list[str]) -> int:
    """Run the command."""
    source = words[0] if words and not words[0].startswith("--") else None
    report, options, title = _plan(source, words[1:] if source else words)
    figures = report.figures()
    unit: draw.Unit = None if options.uniform else "s"
    if options.draw:
        report.picture(Path(options.draw), title, options.steps, unit)
        figures["picture"] = options.draw
    if options.json:
        print(json.dumps(figures))
    else:
        report.tell(Console(), title, unit, options.text)
    return 0


def _plan(source: str | None, words: list[str]) -> tuple[PlanReport, SimulateOptions, str]:
    """Plan from a plan file, a recipe, a costs file or uniform stages."""
    if source is not None and source.endswith(".json"):
        (options,) = parse("simulate plan.json", words, SimulateOptions)
        refuse(words, _FIXED, f"is fixed by the plan '{source}'; leave it out, or name a recipe or --costs instead")
        report = _read(source)
        return report, options, report.title
    if source is not None:
        return _plan_of_recipe([source, *words])
    (options,) = parse("simulate [RECIPE|config.yaml|plan.json]", words, SimulateOptions)
    refuse(words, ("estimate",), "is for a recipe's models; leave it out, or name a recipe")
    if (options.uniform is None) == (options.costs is None):
        raise ConfigError("'simulate' needs one of: a recipe, a config.yaml, a plan.json, --costs FILE, or --uniform T,F,BI,BW")
    if options.uniform is not None:
        planner = planner_of(*demands_of(uniform(options.uniform, options), options))
    else:
        planner = planner_of_file(options.costs or "", options, options.batch)
    report = _made(planner, options, words)
    return report, options, report.title


def _read(path: str) -> PlanReport:
    try:
        return read_plan(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read plan '{path}': {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"'{path}': the plan is not text") from None
    except ConfigError as error:
        raise ConfigError(f"'{path}': {error}") from None


def _plan_of_recipe(words: list[str]) -> tuple[PlanReport, SimulateOptions, str]:
    """Plan for a recipe: blocks are measured as a run does; a pipeline's in this process alone, over links that take no time."""
    recipe, options, rest = recipe_of("simulate", words, SimulateOptions)
    check_drawable(options.draw)
    refuse(rest, ("uniform", *OF_TASKS), "is for stages without a recipe; leave it out, or leave out the recipe")
    workload = built(recipe)
    devices = max(1, options.devices) if workload.kind == "blockwise" else 1
    how = RunOptions(devices=devices, microbatches=max(1, options.microbatches), split_backward=options.split_backward)
    planner = planner_of_recipe(recipe, workload, options.costs, how, options.estimate)
    check_batch(options.batch, workload.train_loader.batch_size)
    report = _made(planner, options, rest)
    return report, options, f"{recipe.name}: {report.title}"


def _made(planner: Planner, options: SimulateOptions, words: Sequence[str]) -> PlanReport:
    """Plan with such costs; keys of the other kind of training on the command line are refused."""
    if options.strategy == "reference":
        raise ConfigError("'reference' is a plain loop without a schedule; there is nothing to simulate")
    if options.strategy is not None:
        check_strategy(options.strategy, planner)
    refuse_foreign(words, planner)
    return planner.make(options)


def check_batch(given: int | None, of_recipe: int | None) -> None:
    """Raise `ConfigError` for a number of rows that is not that of the recipe's batches."""
    if given is not None and given != of_recipe:
        raise ConfigError(f"batch is {given}, and the recipe's batches have {of_recipe} rows; use its --batch_size")
