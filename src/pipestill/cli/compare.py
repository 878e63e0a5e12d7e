"""`pipestill compare RECIPE --devices N --strategies a,b,c`: side by side, in one run.

With `--virtual`, on devices that wait instead of computing: of a recipe or a costs file, or of uniform stages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from pipestill import draw
from pipestill.busy import Busy
from pipestill.cli.measure import CSV, built, costs_of_recipe, drawable
from pipestill.cli.options import Helped, parse, recipe_and_rest, refuse
from pipestill.cli.simulate import WITHOUT_RECIPE, uniform, without_recipe
from pipestill.compare.figures import Comparison
from pipestill.compare.real import compare
from pipestill.compare.virtual import VirtualOptions, compare_virtual_blockwise, compare_virtual_pipelines
from pipestill.costs import Costs
from pipestill.errors import ConfigError
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES
from pipestill.recipes.run import preflight
from pipestill.recipes.run_options import RunOptions
from pipestill.runtime.world import choose_device_type
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.train.engine import REFERENCE


@dataclass(frozen=True)
class VirtualCompareOptions:
    """What is compared on virtual devices.

    Args:
        virtual: compare on devices that wait for as long as the costs say, instead of computing
        devices: pipeline stages or ranks that train blocks, each one process
        microbatches: slices of a batch
        strategies: names with commas between them, among them fill+split (split backwards), fill+stale (staleness 1) and
            fill+split+all (stash all); speedups are over the first one
        costs: a file of costs, or a CSV of blocks for dp, ls, relay, relay-dpu, hybrid and balanced
        batch: rows of a batch, with a CSV of blocks (default: the most that was measured)
        uniform: without a recipe: T,F,BI,BW in seconds: the time that every stage takes for a teacher forward, a student forward,
            its input gradient and its weight gradient
        teacher: without a recipe: the teacher is frozen, a moving average (ema), or none for a student alone
        views: without a recipe: views of each sample, all seen by both models
        batch_loss: without a recipe: the loss takes the whole batch at once
        clip: without a recipe: gradients are clipped by their global norm
        rounds: number of times that each strategy is measured, in turn
        steps: updates in each measurement, at least 6
        timeout_seconds: deadline of every wait, in seconds
        draw: a .svg or .png file to draw all timelines into, one above the other (default: none)
        json: print the figures as one JSON object
    """

    virtual: bool = True
    devices: int = 2
    microbatches: int = 8
    strategies: str = "sequential,gpipe,1f1b,fill"
    costs: str | None = None
    batch: int | None = None
    uniform: str | None = None
    teacher: Literal["frozen", "ema", "none"] = "frozen"
    views: int = 1
    batch_loss: bool = False
    clip: bool = False
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
    try:
        kind, defaults, rest = recipe_and_rest("compare", words)
        recipe, options, wanted = parse(
            f"compare {kind.name}", rest, kind, RunOptions, CompareOptions, defaults=defaults
        )
    except Helped:
        return 0
    refuse(rest, ("strategy",), "names one; 'compare' takes several: --strategies a,b,c")
    refuse(rest, ("teacher",), "is not read by 'compare': how well a teacher does takes no time")
    choose_device_type(options.device, options.devices)  # or what is wrong with it
    workload, strategies = built(recipe, options.seed), _strategies(wanted)
    blockwise = workload.kind == "blockwise"
    if blockwise and not any(word.startswith("--strategies") for word in rest):
        strategies = [name for name in workload.strategies if name != REFERENCE]
    with _note(strategies, options.devices, wanted):
        if not blockwise:  # there, it would also look at trainings that are not compared
            preflight(recipe, options)
        comparison = compare(recipe, options, strategies, rounds=wanted.rounds, steps=wanted.steps)
    return _tell(comparison, wanted)


def _note(strategies: Sequence[str], devices: int, wanted: CompareOptions | VirtualCompareOptions) -> Busy:
    return Busy(
        f"comparing {', '.join(strategies)} on {devices} devices: {wanted.rounds} rounds, {wanted.steps} steps of each"
    )


def run_on_virtual_devices(words: list[str]) -> int:
    """Run the command with `--virtual`."""
    source = words[0] if words and not words[0].startswith("--") else None
    try:
        if source is not None:
            refuse(words, ("uniform", *WITHOUT_RECIPE), "is for stages without a recipe; leave it out")
            refuse(words, ("batch",), OF_A_CSV)
            costs, demands, wanted = costs_of_recipe("compare", words, VirtualCompareOptions)
        else:
            (wanted,) = parse("compare --virtual", words, VirtualCompareOptions)
            if wanted.costs is not None and wanted.costs.lower().endswith(CSV):
                return _compare_blocks(words, wanted)
            refuse(words, ("batch",), OF_A_CSV)
            if (wanted.uniform is None) == (wanted.costs is None):
                raise ConfigError("'compare --virtual' needs a recipe, --costs FILE, or --uniform T,F,BI,BW in seconds")
            costs = uniform(wanted.uniform, wanted) if wanted.uniform is not None else Costs.load(wanted.costs)
            costs, demands = without_recipe(costs, wanted)
    except Helped:
        return 0
    if not wanted.virtual:
        raise ConfigError("virtual is false; leave --virtual out to compare on real devices")
    options = _virtual(wanted, _strategies(wanted))
    costs = costs.with_surroundings(costs.link.only(), 1.0)
    with _note(options.strategies, options.devices, wanted):
        comparison = compare_virtual_pipelines(costs, demands, options, microbatches=wanted.microbatches)
    return _tell(comparison, wanted)


def _virtual(wanted: VirtualCompareOptions, strategies: list[str]) -> VirtualOptions:
    return VirtualOptions(wanted.devices, strategies, wanted.rounds, wanted.steps, wanted.timeout_seconds)


OF_A_CSV = "is for a CSV of blocks (--costs FILE.csv); leave it out"


def _compare_blocks(words: list[str], wanted: VirtualCompareOptions) -> int:
    """Strategies of blockwise training, of a CSV of blocks."""
    pipelines = ("microbatches", "uniform", "teacher", "views", "batch_loss", "clip")
    refuse(words, pipelines, "is for pipelines, and a CSV of blocks is for blocks that learn alone; leave it out")
    given = any(word.startswith("--strategies") for word in words)
    strategies = _strategies(wanted) if given else list(BLOCKWISE_STRATEGIES)
    profile = BlockProfile.load(wanted.costs or "")
    batch = wanted.batch or max(block.rows[-1] for block in profile.blocks)
    with _note(strategies, wanted.devices, wanted):
        comparison = compare_virtual_blockwise(profile, _virtual(wanted, strategies), batch=batch)
    return _tell(comparison, wanted)


def _strategies(wanted: CompareOptions | VirtualCompareOptions) -> list[str]:
    """Their names, once all that can be wrong with the options has been looked at."""
    if wanted.rounds < 1 or wanted.steps < 6:
        raise ConfigError(f"rounds {wanted.rounds} and steps {wanted.steps}; expected at least 1 and 6")
    strategies = [name.strip() for name in wanted.strategies.split(",") if name.strip()]
    if not strategies:
        raise ConfigError("--strategies names none; expected some such as sequential,fill")
    drawable(wanted.draw)
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


def show(figures: dict[str, Any], console: Console) -> None:
    """The comparison as a table, which a narrow terminal breaks and never cuts off."""
    calibration, results = figures["calibration"], figures["results"]
    console.width = max(console.width, 100)  # the table takes what it needs
    console.print(table(results), crop=False)
    if any("plan" in result for result in results):
        console.print(_blocks(calibration, results), highlight=False, soft_wrap=True)
        return
    if calibration.get("virtual"):
        machine = (
            f"Virtual devices: processes and messages are real, work waits. On this machine a trivial pipeline reaches "
            f"{calibration['share_of_ideal']:.1%} (+-{_half(calibration['share_of_ideal_spread']):.1%}) of its ideal; clocks "
            f"were set back by {calibration['late']:.1%} for waits that ended late."
        )
    else:
        machine = (
            f"This machine: a step of the plain loop takes {calibration['alone_seconds_per_step'] * 1e3:.1f} ms alone and "
            f"{calibration['together_seconds_per_step'] * 1e3:.1f} ms in {calibration['devices']} processes at once, so no "
            f"way to share the work can be more than {calibration['ceiling']:.2f} times as fast "
            f"(+-{_half(calibration['ceiling_spread']):.2f}). MiB is the peak of the largest rank."
        )
    console.print(
        f"{machine} Speedups are over {results[0]['strategy']}; stash is in units (a microbatch in one view) of the rank "
        "that holds most; stale is how many steps old the weights are that a step reads.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _blocks(calibration: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """What is to be said of strategies of blockwise training: who trains what, and what the machine can do."""
    lines = []
    for result in results:
        mine = result.get("plan", [])
        if result["strategy"] == "dp":
            lines.append("dp: all ranks train one block after the other, on equal parts of the rows")
        elif mine:
            lines += [f"{result['strategy']}:", *(f"  rank {rank}: {line}" for rank, line in enumerate(mine))]
    least = min(result["limit_seconds_per_step"] for result in results if "plan" in result) * 1e3
    least = f"all work once, shared out evenly, would take {least:.1f} ms"
    if calibration.get("virtual"):
        machine = (
            f"Virtual devices: processes and messages are real, work waits; clocks were set back by {calibration['late']:.1%} "
            f"for waits that ended late, and time ran {calibration['slower']:.1f} times slower than the figures say, so that "
            "actions are long beside what processes on few cores cost each other. A step trains every block on one batch of "
            f"{calibration['batch']} rows; {least}."
        )
    else:
        machine = (
            f"A step trains every block on one batch; {least}. This machine: one pass of all the work takes "
            f"{calibration['alone_seconds_per_step'] * 1e3:.1f} ms alone and "
            f"{calibration['together_seconds_per_step'] * 1e3:.1f} ms in {calibration['devices']} processes at once, so no "
            f"way to share it can be more than "
            f"{calibration['ceiling']:.2f} times as fast (+-{_half(calibration['ceiling_spread']):.2f}). MiB is the peak of the "
            "largest rank."
        )
    return "\n".join([*lines, f"{machine} Speedups are over {results[0]['strategy']}."])


def table(results: list[dict[str, Any]]) -> Table:
    """One row a strategy; what follows +- is half the range of the rounds."""
    real = any("share_of_ceiling" in result for result in results)
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    shown.add_column("strategy", no_wrap=True)
    ends = ("of ceiling", "MiB") if real else ()
    for name in ("ms a step", "predicted", "speedup", "busy", "expected", "stash", "stale", *ends):
        shown.add_column(name, justify="right", no_wrap=True)
    for result in results:
        predicted = result.get("predicted_seconds_per_step")
        spread = [s * 1e3 for s in result["seconds_per_step_spread"]]
        cells = [
            result["strategy"],
            f"{result['seconds_per_step'] * 1e3:.1f} +-{_half(spread):.1f}",
            f"{predicted * 1e3:.1f}" if predicted else "",
            f"{result['speedup']:.2f} +-{_half(result['speedup_spread']):.2f}",
            f"{result['utilisation']:.1%}" if "utilisation" in result else "",
            f"{result['predicted_utilisation']:.1%}" if "predicted_utilisation" in result else "",
            str(max(result["stash_peak"])) if "stash_peak" in result else "",
            str(result["staleness"]) if "staleness" in result else "",
        ]
        if real:
            cells += [f"{result['share_of_ceiling']:.0%}", f"{max(result['peak_memory_bytes']) / 2**20:.0f}"]
        shown.add_row(*cells)
    return shown


def _half(spread: list[float]) -> float:
    return (spread[1] - spread[0]) / 2
