"""`pipestill profile RECIPE -o FILE`: what every block costs, and the links between devices."""

import json
from dataclasses import dataclass

from rich.console import Console

from pipestill.cli.costs import built, check_out, planner_of_recipe, recipe_of
from pipestill.cli.figures import show_line
from pipestill.cli.files import check_writable
from pipestill.errors import ConfigError
from pipestill.recipes.run_options import RunOptions


@dataclass(frozen=True)
class ProfileOptions:
    """What is measured, and where it goes.

    Args:
        out: the file to write, also -o: a .json of costs, or a .csv of blocks for a recipe that trains block by block; --costs of
            other commands takes either (default: none)
        estimate: compute the costs of a pipeline for a device that is not here: v100, a100, h100 or h200, with :fp32, :bf16 or
            the like behind it for another precision than its usual one (default: measure costs here)
        devices: processes with which the links between them, and how much they slow each other down, are measured; blocks are
            measured with the rows that 1 to this many ranks would have of a batch
        microbatches: slices of a batch; costs of a pipeline are for one slice
        device: cpu or cuda, between which links are measured (default: cuda where there are enough devices); blocks are measured
            on the CPU, as before a run
        seed: seed of the initial weights and of the order of the data
        threads: CPU threads of each process that measures (default: the cores, divided evenly)
        timeout_seconds: deadline of every wait, in seconds
        json: print what was measured as one JSON object
    """

    out: str | None = None
    estimate: str | None = None
    devices: int = 1
    microbatches: int = 8
    device: str | None = None
    seed: int = 0
    threads: int | None = None
    timeout_seconds: float = 600.0
    json: bool = False


def run(words: list[str]) -> int:
    """Run the command."""
    recipe, options, _ = recipe_of("profile", words, ProfileOptions)
    if options.devices < 1 or options.microbatches < 1:
        raise ConfigError(f"devices {options.devices} and microbatches {options.microbatches}; expected at least 1 each")
    workload = built(recipe, options.seed)
    check_out(options.out, recipe, workload)
    check_writable(options.out)
    if options.estimate is not None and options.devices > 1:
        raise ConfigError("--devices starts processes that measure, and --estimate measures nothing; leave one of them out")
    how = RunOptions(
        devices=options.devices, microbatches=options.microbatches, split_backward=workload.kind == "pipeline",
        device=options.device, seed=options.seed, threads=options.threads, timeout_seconds=options.timeout_seconds,
    )  # fmt: skip
    planner = planner_of_recipe(recipe, workload, None, how, options.estimate)
    figures = {"recipe": recipe.name, "devices": options.devices, "file": options.out}
    if options.out is not None:
        planner.save(options.out)
    if options.json:
        print(json.dumps({**figures, **planner.figures(options.microbatches)}, allow_nan=False))
        return 0
    console = Console()
    planner.tell(console, options.devices)
    if options.out is not None:
        show_line(console, f"written to {options.out}")
    return 0
