"""`pipestill check RECIPE --strategy S --devices N`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from pipestill.busy import Busy
from pipestill.cli.costs import built
from pipestill.cli.figures import counted, say
from pipestill.cli.options import parse, recipe_and_rest, refuse
from pipestill.errors import ConfigError
from pipestill.recipes.run import check_options
from pipestill.recipes.run_options import Kind, RunOptions
from pipestill.runtime.world import choose_device_type
from pipestill.verify import TRANSPORTS, verify

_SHOWN = 10  # of weights that differ


@dataclass(frozen=True)
class CheckOptions:
    """What is checked.

    Args:
        steps: updates of the student, or of each of its blocks, after which weights are compared
        transport: let ranks take turns in one process, be one process each, or check both ways
        json: print the result as one JSON object
    """

    steps: int = 20
    transport: Literal["in-process", "process-group", "both"] = "both"
    json: bool = False


def run(words: list[str]) -> int:
    """Run the command; status 1 when the weights differ."""
    kind, defaults, rest = recipe_and_rest("check", words)
    recipe, options, wanted = parse(f"check {kind.name}", rest, kind, RunOptions, CheckOptions, defaults=defaults)
    refuse(rest, ("teacher",), "is not read by 'check': any teacher proves it, and this one is as it was initialised")
    if wanted.steps < 1:
        raise ConfigError(f"steps is {wanted.steps}; expected at least 1")
    transports = TRANSPORTS if wanted.transport == "both" else (wanted.transport,)
    if options.devices <= 1:
        transports = ("in-process",)
    device_type = choose_device_type(options.device, max(1, options.devices))
    workload = built(recipe, options.seed)
    check_options(recipe, workload, options)
    with Busy(f"training {wanted.steps} steps with '{options.strategy}' and with a plain loop"):
        result = verify(recipe, options, steps=wanted.steps, transports=transports, device_type=device_type)
    if wanted.json:
        print(json.dumps(result))
    else:
        _TELL[workload.kind](result, options, Console())
    return 1 if result["problems"] else 0


def _tell_of_pipeline(result: dict[str, Any], options: RunOptions, console: Console) -> None:
    """Print what the check of a pipeline found."""
    devices = counted(options.devices, "device")
    say(console, f"{options.strategy} on {devices}, {options.microbatches} microbatches, {result['steps']} steps")
    if result["versions"]:
        say(console, "schedule proved: every unit of work once, no deadlock, lanes in order, stash within its bound")
        for version in result["versions"]:
            say(
                console,
                f"  step {version['step']} reads student version {_list(version['student'])}, "
                f"teacher version {_list(version['teacher'])}",
            )
    for problem in result["problems"]:
        say(console, f"  {problem}")
    verdict = "bit-identical to" if result["exact"] else "NOT identical to"
    stale = result["staleness"]
    which = "the reference" + (f" that reads weights {stale} step old" if stale else "")
    say(console, f"weights after {result['steps']} steps: {verdict} {which} ({' and '.join(result['transports'])})")
    missing, difference = result["microbatch_difference_missing"], result["microbatch_difference"]
    found = f"not compared: {missing}" if missing else f"relative difference {difference:.1e}"
    say(console, f"loss and gradients of one batch in 1 and in {options.microbatches} microbatches: {found}")
    if result["whole_backwards"]:
        say(console, f"backwards that stay whole: {'; '.join(result['whole_backwards'])}")


def _tell_of_blocks(result: dict[str, Any], options: RunOptions, console: Console) -> None:
    """Print what the check of blockwise training found."""
    devices = counted(result["devices"], "device")
    say(console, f"{result['strategy']} on {devices}, {result['steps']} batches for each block")
    for rank, words in enumerate(result["ranks"]):
        say(console, f"  rank {rank}: {words}")
    for problem in result["problems"][:_SHOWN]:
        say(console, f"  {problem}")
    if len(result["problems"]) > _SHOWN:
        say(console, f"  and {len(result['problems']) - _SHOWN} more")
    which = f"each block trained alone ({' and '.join(result['transports'])})"
    if result["exact"]:
        verdict = f"bit-identical to {which}"
    elif result["problems"]:
        verdict = f"NOT those of {which}"
    else:
        verdict = f"those of {which}"
    say(console, f"weights after {result['steps']} batches: {verdict}")
    if result["rows_split"]:
        say(
            console,
            "ranks share the rows of a batch, so sums are rounded in another order: compared in float64 with batch norm frozen, "
            f"largest relative difference {result['max_relative_difference']:.1e}, at most {result['tolerance']:g} is rounding",
        )


def _list(versions: tuple[int, ...]) -> str:
    return ", ".join(map(str, versions)) or "none"


_TELL: dict[Kind, Callable[[dict[str, Any], RunOptions, Console], None]] = {
    "pipeline": _tell_of_pipeline, "blockwise": _tell_of_blocks,
}  # fmt: skip
