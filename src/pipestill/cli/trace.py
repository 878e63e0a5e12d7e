"""`pipestill trace RUN_DIR`: what happened in a run, below what was predicted, as a picture and for Perfetto."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from pipestill import draw
from pipestill.cli.options import Helped, parse
from pipestill.errors import ConfigError
from pipestill.plan import Plan
from pipestill.plan.blockwise.describe import describe
from pipestill.plan.blockwise.json import block_plan_from_json, is_block_plan
from pipestill.plan.blockwise.plan import BlockwisePlan
from pipestill.recipes.blockwise import draw_blocks, trace_names
from pipestill.train.run_directory import RunDirectory


@dataclass(frozen=True)
class TraceOptions:
    """What is drawn.

    Args:
        draw: a .svg or .png file to draw the picture into (default: RUN_DIR/timeline.svg)
        steps: steady steps in the picture; of a schedule for blocks, whose steps may hold several batches
        json: print the figures as one JSON object
    """

    draw: str | None = None
    steps: int = 2
    json: bool = False


def run(words: list[str]) -> int:
    """Run the command."""
    try:
        if not words or words[0].startswith("-"):
            if "--help" in words or "-h" in words:
                parse("trace RUN_DIR", words, TraceOptions)
            raise ConfigError("'trace' needs the directory of a run, as in 'pipestill trace runs/soft-target-1'")
        (options,) = parse("trace RUN_DIR", words[1:], TraceOptions)
    except Helped:
        return 0
    directory = RunDirectory.open(words[0])
    summary = directory.read_json("summary.json")
    if not (directory / "plan.json").is_file():
        raise ConfigError(f"'{words[0]}' was a run of '{summary['strategy']}', a plain loop, which leaves no timeline")
    text = (directory / "plan.json").read_text()
    if is_block_plan(text):
        return _tell_of_blocks(block_plan_from_json(text), directory, summary, options)
    plan = Plan.from_json(text)
    trace = draw.read_chrome_trace(directory / "trace.json.gz")
    picture = Path(options.draw) if options.draw else directory / "timeline.svg"
    devices = f"{summary['devices']} {'device' if summary['devices'] == 1 else 'devices'}"
    titles = [f"{summary['strategy']} on {devices}, {half}" for half in ("predicted", "measured")]
    draw.picture([plan.prediction, trace], picture, titles=titles, num_steps=options.steps)
    figures = {
        "strategy": summary["strategy"],
        "devices": summary["devices"],
        "seconds_per_step": trace.median_seconds_per_step,
        "predicted_seconds_per_step": summary["predicted_seconds_per_step"],
        "utilisation": trace.utilisation,
        "bubble": trace.bubble,
        "stash_peak": list(trace.stash_peak),
        "picture": str(picture),
        "perfetto": str(directory / "trace.json.gz"),
    }
    if options.json:
        print(json.dumps(figures))
        return 0
    console = Console()
    coloured = draw.text(trace, width=console.width, colour=console.is_terminal)
    console.print(Text.from_ansi(coloured))
    console.print(
        f"{trace.median_seconds_per_step * 1e3:.1f} ms a step, utilisation {trace.utilisation:.1%}, "
        f"stash peak {' '.join(map(str, trace.stash_peak))}\npicture: {picture}\n"
        f"timeline for https://ui.perfetto.dev: {directory / 'trace.json.gz'}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def _tell_of_blocks(plan: BlockwisePlan, directory: RunDirectory, summary: dict[str, Any], options: TraceOptions) -> int:
    """The same for a run that trained block by block, whose phases have a trace each."""
    files = [directory / name for name in trace_names(len(plan.phases))]
    traces = [draw.read_chrome_trace(file) for file in files]
    picture = Path(options.draw) if options.draw else directory / "timeline.svg"
    draw_blocks(plan, traces, picture, options.steps)
    figures = {
        "strategy": summary["strategy"],
        "devices": summary["devices"],
        "seconds_per_step": summary["seconds_per_step"],
        "predicted_seconds_per_step": summary["predicted_seconds_per_step"],
        "utilisation": summary["utilisation"],
        "bubble": summary["bubble"],
        "ranks": describe(plan),
        "picture": str(picture),
        "perfetto": [str(file) for file in files],
    }
    if options.json:
        print(json.dumps(figures))
        return 0
    console = Console()
    for trace in traces:
        console.print(Text.from_ansi(draw.text(trace, width=console.width, colour=console.is_terminal)))
    for rank, words in enumerate(figures["ranks"]):
        console.print(f"rank {rank}: {words}", highlight=False, soft_wrap=True)
    console.print(
        f"{summary['seconds_per_step'] * 1e3:.1f} ms a batch of all blocks, utilisation {summary['utilisation']:.1%}\n"
        f"picture: {picture}\ntimeline for https://ui.perfetto.dev: {', '.join(figures['perfetto'])}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0
