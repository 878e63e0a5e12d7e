"""`pipestill compare RECIPE --devices N --strategies a,b,c`: side by side, in one run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pipestill import draw
from pipestill.cli.options import Helped, parse, recipe_and_rest, refuse
from pipestill.compare import compare
from pipestill.errors import ConfigError
from pipestill.recipes.run import RunOptions, preflight
from pipestill.runtime.world import choose_device_type


@dataclass(frozen=True)
class CompareOptions:
    """What is compared.

    Args:
        strategies: names with commas between them, among them reference, torch-1f1b and torch-gpipe (PyTorch's own
            pipelines, the teacher run first); speedups are over the first
        rounds: how often each is measured, in turn
        steps: updates of each measurement, at least 6
        draw: a .svg or .png file for all timelines, one above the other
        json: print the figures as one JSON object
    """

    strategies: str = "sequential,gpipe,1f1b,fill"
    rounds: int = 3
    steps: int = 12
    draw: str | None = None
    json: bool = False


def run(words: list[str]) -> int:
    """Run the command."""
    try:
        kind, defaults, rest = recipe_and_rest("compare", words)
        recipe, options, wanted = parse(
            f"compare {kind.name}", rest, kind, RunOptions, CompareOptions, defaults=defaults
        )
    except Helped:
        return 0
    refuse(rest, ("strategy",), "names one; 'compare' takes several: --strategies a,b,c")
    refuse(rest, ("teacher",), "is not read by 'compare': how well a teacher does takes no time")
    if wanted.rounds < 1 or wanted.steps < 6:
        raise ConfigError(f"rounds {wanted.rounds} and steps {wanted.steps}; expected at least 1 and 6")
    preflight(recipe, options)
    strategies = [name.strip() for name in wanted.strategies.split(",") if name.strip()]
    if not strategies:
        raise ConfigError("--strategies names none; expected some such as sequential,fill")
    if wanted.draw and not Path(wanted.draw).parent.is_dir():  # seen before minutes of measuring, not after
        raise ConfigError(f"cannot write '{wanted.draw}': there is no directory '{Path(wanted.draw).parent}'")
    device_type = choose_device_type(options.device, options.devices)
    comparison = compare(recipe, options, strategies, rounds=wanted.rounds, steps=wanted.steps, device_type=device_type)
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
    console.print(
        f"This machine: a step of the plain loop takes {calibration['alone_seconds_per_step'] * 1e3:.1f} ms alone and "
        f"{calibration['together_seconds_per_step'] * 1e3:.1f} ms in {calibration['devices']} processes at once, so no "
        f"way to share the work can be more than {calibration['ceiling']:.2f} times as fast "
        f"(+-{_half(calibration['ceiling_spread']):.2f}). Speedups are over {results[0]['strategy']}; stash is in "
        "microbatches of the rank that holds most, and MiB is the peak of the largest rank.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def table(results: list[dict[str, Any]]) -> Table:
    """One row a strategy; what follows +- is half the range of the rounds."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    shown.add_column("strategy", no_wrap=True)
    for name in ("ms a step", "predicted", "speedup", "of ceiling", "busy", "stash", "MiB"):
        shown.add_column(name, justify="right", no_wrap=True)
    for result in results:
        predicted = result.get("predicted_seconds_per_step")
        spread = [s * 1e3 for s in result["seconds_per_step_spread"]]
        shown.add_row(
            result["strategy"],
            f"{result['seconds_per_step'] * 1e3:.1f} +-{_half(spread):.1f}",
            f"{predicted * 1e3:.1f}" if predicted else "",
            f"{result['speedup']:.2f} +-{_half(result['speedup_spread']):.2f}",
            f"{result['share_of_ceiling']:.0%}",
            f"{result['utilisation']:.0%}" if "utilisation" in result else "",
            str(max(result["stash_peak"])) if "stash_peak" in result else "",
            f"{max(result['peak_memory_bytes']) / 2**20:.0f}",
        )
    return shown


def _half(spread: list[float]) -> float:
    return (spread[1] - spread[0]) / 2
