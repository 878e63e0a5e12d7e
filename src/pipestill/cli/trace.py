"""`pipestill trace RUN_DIR`: what happened in a run, below what was predicted, as a picture and for Perfetto."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pipestill import draw
from pipestill.cli.costs import read_plan
from pipestill.cli.figures import show_line
from pipestill.cli.options import parse
from pipestill.errors import ConfigError
from pipestill.train.run_directory import RunDirectory


@dataclass(frozen=True)
class TraceOptions:
    """What is drawn.

    Args:
        draw: a .svg or .png file to draw the picture into (default: RUN_DIR/timeline.svg)
        steps: steady steps in the picture; a step of blockwise training is one window of batches
        json: print the figures as one JSON object
    """

    draw: str | None = None
    steps: int = 2
    json: bool = False


def run(words: list[str]) -> int:
    """Run the command."""
    if not words or words[0].startswith("-"):
        if "--help" in words or "-h" in words:
            parse("trace RUN_DIR", words, TraceOptions)
        raise ConfigError("'trace' needs the directory of a run, as in 'pipestill trace runs/soft-target-1'")
    (options,) = parse("trace RUN_DIR", words[1:], TraceOptions)
    directory = RunDirectory.open(words[0])
    summary = directory.read_json("summary.json")
    if not (directory / "plan.json").is_file():
        raise ConfigError(f"'{words[0]}' was a run of '{summary['strategy']}', a plain loop, which leaves no timeline")
    report = read_plan((directory / "plan.json").read_text())
    files = [directory / name for name in report.trace_files]
    traces = [draw.read_chrome_trace(file) for file in files]
    picture = Path(options.draw) if options.draw else directory / "timeline.svg"
    report.run_picture(traces, picture, options.steps)
    figures = {name: summary[name] for name in ("strategy", "devices", "predicted_seconds_per_step")}
    figures |= {**report.run_figures(traces, summary, files), "picture": str(picture)}
    if options.json:
        print(json.dumps(figures))
        return 0
    console = Console()
    for trace in traces:
        console.print(Text.from_ansi(draw.text(trace, width=console.width, colour=console.is_terminal)))
    report.tell_run(console, figures)
    show_line(console, f"picture: {picture}")
    show_line(console, f"timeline for https://ui.perfetto.dev: {', '.join(map(str, files))}")
    return 0
