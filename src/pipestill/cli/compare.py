"""`pipestill compare RECIPE --devices N --strategies a,b,c`: side by side, in one run.

With `--virtual`, on devices that wait instead of computing: of a recipe or a costs file, or of uniform stages.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pipestill import draw
from pipestill.busy import Busy
from pipestill.cli.comparison import show
from pipestill.cli.costs import Planner, built, pipeline_of_recipe, planner_of, planner_of_file
from pipestill.cli.figures import counted
from pipestill.cli.files import check_drawable
from pipestill.cli.kinds import FOREIGN, OF_TASKS, WHY_FOREIGN
from pipestill.cli.options import given_keys, parse, recipe_and_rest, refuse
from pipestill.cli.without_recipe import CostsOptions, demands_of, uniform
from pipestill.compare.figures import Comparison
from pipestill.compare.real import compare
from pipestill.compare.virtual import VirtualOptions
from pipestill.errors import ConfigError
from pipestill.recipes.run import preflight
from pipestill.recipes.run_options import RunOptions
from pipestill.runtime.world import choose_device_type
from pipestill.train.engine import REFERENCE


@dataclass(frozen=True)
class VirtualCompareOptions(CostsOptions):
    """What is compared on virtual devices.

    Args:
        virtual: compare on devices that wait for as long as the costs say, instead of computing
        strategies: names with commas between them, among them fill+split (split backwards), fill+stale (staleness 1) and
            fill+split+all (stash all); speedups are over the first one
        uniform: without a recipe: T,F,BI,BW in seconds: the time that every stage takes for a teacher forward, a student forward,
            its input gradient and its weight gradient
        rounds: number of times that each strategy is measured, in turn
        steps: updates in each measurement, at least 6
        timeout_seconds: deadline of every wait, in seconds
        draw: a .svg or .png file to draw all timelines into, one above the other (default: none)
        json: print the figures as one JSON object
    """

    virtual: bool = True
    strategies: str = "sequential,gpipe,1f1b,fill"
    uniform: str | None = None
    rounds: int = 3
    steps: int = 12
    timeout_seconds: float = 600.0
    draw: str | None = None
    json: bool = False


@dataclass(frozen=True)
class CompareOptions:
    """What is compared.

    Args:
        strategies: names with commas between them, among them fill+split (split backwards), fill+stale (staleness 1),
            fill+split+all (stash all), reference, torch-1f1b and torch-gpipe (PyTorch's own pipelines, the teacher run first);
            speedups are over the first one
        rounds: number of times that each strategy is measured, in turn
        steps: updates in each measurement, at least 6
        draw: a .svg or .png file to draw all timelines into, one above the other (default: none)
        json: print the figures as one JSON object
    """

    strategies: str = "sequential,gpipe,1f1b,fill"
    rounds: int = 3
    steps: int = 12
    draw: str | None = None
    json: bool = False


def run(words: list[str]) -> int:
    """Run the command."""
    if any(word.replace("_", "-").startswith("--virtual") for word in words):
        return run_on_virtual_devices(words)
    kind, defaults, rest = recipe_and_rest("compare", words)
    recipe, options, wanted = parse(f"compare {kind.name}", rest, kind, RunOptions, CompareOptions, defaults=defaults)
    refuse(rest, ("strategy",), "names one; 'compare' takes several: --strategies a,b,c")
    refuse(rest, ("teacher",), "is not read by 'compare': how well a teacher does takes no time")
    choose_device_type(options.device, options.devices)  # or what is wrong with it
    workload = built(recipe, options.seed)
    of_blocks = [name for name in workload.strategies if name != REFERENCE]
    by_blocks = workload.kind == "blockwise" and "strategies" not in given_keys(rest)
    strategies = _strategies(wanted, of_blocks if by_blocks else None)
    with _note(strategies, options.devices, wanted):
        if workload.kind == "pipeline":  # of blocks, it would look at trainings too that are not compared
            preflight(recipe, options)
        comparison = compare(recipe, options, strategies, rounds=wanted.rounds, steps=wanted.steps)
    return _tell(comparison, wanted)


def run_on_virtual_devices(words: list[str]) -> int:
    """Run the command with `--virtual`."""
    source = words[0] if words and not words[0].startswith("--") else None
    if source is not None:
        refuse(words, ("uniform", *OF_TASKS), "is for stages without a recipe; leave it out")
        planner, wanted = pipeline_of_recipe("compare", words, VirtualCompareOptions)
    else:
        (wanted,) = parse("compare --virtual", words, VirtualCompareOptions)
        if (wanted.uniform is None) == (wanted.costs is None):
            raise ConfigError("'compare --virtual' needs a recipe, --costs FILE, or --uniform T,F,BI,BW in seconds")
        planner = _planner(wanted)
    refuse(words, [key for key in FOREIGN[planner.kind] if key != "uniform"], WHY_FOREIGN[planner.kind])
    if not wanted.virtual:
        raise ConfigError("virtual is false; leave --virtual out to compare on real devices")
    by_blocks = planner.kind == "blockwise" and "strategies" not in given_keys(words)
    strategies = _strategies(wanted, planner.strategies if by_blocks else None)
    options = VirtualOptions(wanted.devices, strategies, wanted.rounds, wanted.steps, wanted.timeout_seconds)
    with _note(strategies, wanted.devices, wanted):
        comparison = planner.compare(options, wanted.microbatches)
    return _tell(comparison, wanted)


def _planner(wanted: VirtualCompareOptions) -> Planner:
    """The planner of a file or of uniform stages."""
    if wanted.uniform is not None:
        return planner_of(*demands_of(uniform(wanted.uniform, wanted), wanted))
    return planner_of_file(wanted.costs or "", wanted, wanted.batch)


def _note(strategies: Sequence[str], devices: int, wanted: CompareOptions | VirtualCompareOptions) -> Busy:
    rounds = f"{counted(wanted.rounds, 'round')}, {wanted.steps} steps of each"
    return Busy(f"comparing {', '.join(strategies)} on {counted(devices, 'device')}: {rounds}")


def _strategies(wanted: CompareOptions | VirtualCompareOptions, usual: Iterable[str] | None) -> list[str]:
    """List the names of strategies, `usual` or the wanted ones; `ConfigError` for options that cannot be."""
    if wanted.rounds < 1 or wanted.steps < 6:
        raise ConfigError(f"rounds {wanted.rounds} and steps {wanted.steps}; expected at least 1 and 6")
    strategies = list(usual or (name.strip() for name in wanted.strategies.split(",") if name.strip()))
    if not strategies:
        raise ConfigError("--strategies names none; expected some such as sequential,fill")
    check_drawable(wanted.draw)
    return strategies


def _tell(comparison: Comparison, wanted: CompareOptions | VirtualCompareOptions) -> int:
    if wanted.draw and comparison.traces:
        draw.picture(list(comparison.traces.values()), Path(wanted.draw), titles=list(comparison.traces))
    if wanted.json:
        print(json.dumps(comparison.figures))
    else:
        show(comparison.figures, Console())
        if wanted.draw:
            print(f"picture: {wanted.draw}")
    return 0
