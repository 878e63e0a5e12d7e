"""`pipestill plan RECIPE --devices N -o plan.json`: every strategy that could train it, timed, and the fastest one."""

import json
import shlex
from dataclasses import dataclass

from rich.console import Console

from pipestill.busy import Busy
from pipestill.cli.costs import Planner, built, check_strategy, planner_of_file, planner_of_recipe, recipe_of, refuse_foreign
from pipestill.cli.figures import show_line
from pipestill.cli.files import check_writable, write_json
from pipestill.cli.kinds import OF_TASKS
from pipestill.cli.options import given_keys, parse, recipe_and_rest, refuse, spelled
from pipestill.cli.simulate import check_batch
from pipestill.cli.without_recipe import PlanningOptions
from pipestill.errors import ConfigError
from pipestill.recipes.run_options import RunOptions


@dataclass(frozen=True)
class PlanOptions(PlanningOptions):
    """What is planned for, and where the plan goes.

    Args:
        out: the file to write the plan to, also -o, for 'pipestill simulate' (default: none)
        strategy: consider only this strategy, with its variants; read from the command line alone (default: all)
        staleness: 1 to also consider strategies whose momentum teacher is one step old (default: 0)
        device: cpu or cuda, between which links are measured (default: cuda where there are enough devices)
        threads: CPU threads of each process that measures (default: the cores, divided evenly)
        json: print everything that was considered as one JSON object
    """

    out: str | None = None
    device: str | None = None
    threads: int | None = None
    json: bool = False


def run(words: list[str]) -> int:
    """Run the command."""
    source = words[0] if words and not words[0].startswith("-") else None
    planner, experiment, options = _of_file(words) if source is None else _of_recipe(words)
    recipe = next(iter(experiment), None)
    if options.strategy is not None:
        check_strategy(options.strategy.split("+")[0], planner)
    refuse_foreign(words, planner)
    with Busy("planning") as note:
        found = planner.search(options, progress=lambda name: note.change(f"planning {name}"))
    if options.out is not None:
        write_json(options.out, found.plan)
    if options.json:
        print(json.dumps({**found.figures, "recipe": recipe, "file": options.out}, allow_nan=False))
        return 0
    console = Console()
    found.tell(console)
    if options.out is not None:
        show_line(console, f"written to {options.out}; 'pipestill simulate {shlex.quote(options.out)}' draws it")
    if recipe is not None:
        keys = {"devices": options.devices, **found.keys} | {"memory": options.memory, "device": options.device}
        # A pipeline's plan holds its costs, from which training finds the same plan again.
        keys["costs"] = options.costs or (options.out if planner.kind == "pipeline" else None)
        show_line(console, shlex.join(["pipestill", "train", *experiment, *spelled(keys)]))
    return 0


def _of_recipe(words: list[str]) -> tuple[Planner, list[str], PlanOptions]:
    """Make the planner of a recipe's costs; the words that make the same experiment again are the second."""
    recipe, options, rest = recipe_of("plan", words, PlanOptions, asked_for=("strategy",))
    refuse(rest, OF_TASKS, "is for costs without a recipe; leave it out")
    _check_files(options)
    if options.costs is not None:
        refuse(rest, ("device", "threads"), f"is for measuring, and '{options.costs}' is given; leave it out")
    workload = built(recipe)
    how = RunOptions(
        devices=max(1, options.devices), microbatches=max(1, options.microbatches),
        split_backward=workload.kind == "pipeline", device=options.device, threads=options.threads,
    )  # fmt: skip
    planner = planner_of_recipe(recipe, workload, options.costs, how, options.estimate)
    check_batch(options.batch, workload.train_loader.batch_size)
    own = vars(recipe)
    given = {key: own[key] for key in [*recipe_and_rest("plan", words)[1], *given_keys(rest)] if key in own}
    return planner, [recipe.name, *spelled(given)], options


def _of_file(words: list[str]) -> tuple[Planner, list[str], PlanOptions]:
    (options,) = parse("plan [RECIPE|config.yaml]", words, PlanOptions)
    refuse(words, ("device", "threads"), "is for measuring a recipe; leave it out")
    refuse(words, ("estimate",), "is for a recipe's models; leave it out, or name a recipe instead of --costs")
    _check_files(options)
    if options.costs is None:
        raise ConfigError("'plan' needs one of: a recipe, a config.yaml, or --costs FILE (.json, or .csv of blocks)")
    return planner_of_file(options.costs, options, options.batch), [], options


def _check_files(options: PlanOptions) -> None:
    if options.out is not None and not options.out.endswith(".json"):
        raise ConfigError(f"cannot write '{options.out}': a plan's name must end in .json")
    check_writable(options.out)
