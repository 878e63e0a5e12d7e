"""`pipestill train RECIPE|config.yaml [--KEY VALUE ...]`."""

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from pipestill.busy import Busy
from pipestill.cli.figures import counted, say
from pipestill.cli.options import parse, recipe_and_rest, vars_of
from pipestill.errors import PlanError
from pipestill.recipes.run import preflight, run_recipe
from pipestill.recipes.run_options import RunOptions
from pipestill.runtime.launch import launch
from pipestill.runtime.world import choose_device_type, in_main_process
from pipestill.train.run_directory import RunDirectory


@dataclass(frozen=True)
class Output:
    """Where results go.

    Args:
        out: the directory of the run, also -o (default: runs/RECIPE-N)
        json: print the summary as one JSON object, instead of progress and a table
    """

    out: str | None = None
    json: bool = False


def run(words: list[str]) -> int:
    """Run the command; every rank of a torchrun job runs it too."""
    kind, defaults, rest = recipe_and_rest("train", words)
    recipe, options, output = parse(f"train {kind.name}", rest, kind, RunOptions, Output, defaults=defaults)
    if options.devices < 1:
        raise PlanError(f"devices is {options.devices}; expected at least 1 (--devices)")
    device_type = choose_device_type(options.device, options.devices)
    directory = None
    if in_main_process():
        with Busy("checking models, data and options"):
            preflight(recipe, options)
        directory = RunDirectory.create(output.out, recipe.name)
        everything = {"recipe": recipe.name, **vars_of(recipe), **vars_of(options)}
        directory.write("config.yaml", yaml.safe_dump(everything, sort_keys=False))
    arguments = (recipe, options, directory, output.json)
    under_torchrun = "WORLD_SIZE" in os.environ
    try:
        if options.devices == 1 or under_torchrun:
            if options.threads is not None:
                torch.set_num_threads(options.threads)
            summary = run_recipe(*arguments)
        else:
            summary = launch(
                run_recipe, arguments, options.devices, device_type=device_type, threads=options.threads,
                timeout_seconds=options.timeout_seconds,
            )  # fmt: skip
    except BaseException:
        if directory is not None:
            directory.remove_if_untouched()
        raise
    if directory is None:
        return 0
    if output.json:
        print(json.dumps({"directory": str(directory.path), **summary}))
    else:
        show(summary, directory, Console())
    return 0


def found(search: dict[str, Any]) -> str:
    """Say which network a search found, and how large it is."""
    paths = " | ".join(" ".join(stage) for stage in search["paths"])
    sizes = [
        f"{name.replace('_', ' ')} {search['flops'][name] / 1e6:,.2f} MFLOPs, {search['parameters'][name]:,} parameters"
        for name in ("student", "largest_path", "teacher")
    ]
    return f"found: {paths}\nan image takes: {'; '.join(sizes)}"


def chosen(library: dict[str, Any]) -> str:
    """Which candidate each block of an assembled model is, what that costs, and where all scores are."""
    picks = ", ".join(f"{row['block']} {row['candidate']}" for row in library["candidates"] if row["chosen"])
    return (
        f"chosen of {len(library['candidates'])} candidates: {picks}\n"
        f"that takes {library['cost']:.0%} of the teacher's {library['budget_of']} there (budget {library['budget']:.0%}). "
        "Scores are in summary.json, library"
    )


def show(summary: dict[str, Any], directory: RunDirectory, console: Console) -> None:
    """Print the results of a run for a person."""
    metrics = summary["metrics"]
    rows = [
        (title, key)
        for title, key in (
            ("teacher", "teacher"), ("random paths of the supernet, on average", "random_paths"),
            ("student, its blocks trained alone", "blocks"),
            ("student, then fine-tuned" if "blocks" in metrics else "student, distilled", "student"),
            ("student without a teacher" if "blocks" in metrics else "student alone", "student_alone"),
            ("the same network, untrained", "untrained"),
        )
        if set(metrics.get(key, {})) - {"loss"} and not (key == "student" and metrics[key] == metrics.get("blocks"))
    ]  # fmt: skip
    names = [name for name in metrics[rows[0][1]] if name not in ("loss", "read_from")]
    table = Table(title=f"{summary['recipe']}: on data that no model was trained on", title_justify="left")
    table.add_column("model")
    table.add_column("parameters", justify="right")
    prefix = "test " if len(names) <= 3 else ""  # so that models have room at 80 columns
    for name in names:
        table.add_column(prefix + name.replace("_", " "), justify="right")
    for title, key in rows:
        parameters = metrics["parameters"]["teacher" if key in ("teacher", "untrained") else "student"]
        shown = "" if key == "random_paths" else f"{parameters:,}"
        table.add_row(title, shown, *(f"{metrics[key][name]:.4f}" for name in names))
    console.print(table)
    if "search" in summary:
        say(console, found(summary["search"]))
    if "library" in summary:
        say(console, chosen(summary["library"]))
    predicted = summary["predicted_seconds_per_step"]
    expected = f" (predicted {predicted * 1e3:.1f})" if predicted else ""
    step = "batch of all blocks" if "blocks" in metrics else "step"
    say(
        console,
        f"{summary['strategy']} on {counted(summary['devices'], 'device')} ({summary['backend']}): "
        f"{summary['samples_per_second']:.0f} samples/s, {summary['seconds_per_step'] * 1e3:.1f} ms a {step}{expected}",
    )
    say(
        console,
        f"utilisation {summary['utilisation']:.1%}, bubble {summary['bubble']:.1%}, staleness {summary['staleness']}, "
        f"peak memory {max(summary['peak_memory_bytes']) / 2**20:.0f} MiB a rank",
    )
    files = ("summary.json", "timeline.svg", "export/model.safetensors")
    written = [name for name in files if (directory / name).exists()]
    say(console, f"everything is in {directory.path}/: {', '.join(written)}")
