"""`pipestill check RECIPE --strategy S --devices N`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from pipestill.busy import Busy
from pipestill.cli.measure import built
from pipestill.cli.options import Helped, parse, recipe_and_rest, refuse
from pipestill.errors import ConfigError
from pipestill.recipes.run import check_options
from pipestill.recipes.run_options import RunOptions
from pipestill.runtime.world import choose_device_type
from pipestill.verify.weights import TRANSPORTS, verify

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
    try:
        kind, defaults, rest = recipe_and_rest("check", words)
        recipe, options, wanted = parse(f"check {kind.name}", rest, kind, RunOptions, CheckOptions, defaults=defaults)
    except Helped:
        return 0
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
    elif workload.kind == "blockwise":
        tell_of_blocks(result)
    else:
        tell(result, options)
    return 1 if result["problems"] else 0


def tell(result: dict[str, Any], options: RunOptions) -> None:
    """What came of a pipeline, for a person."""
    console = Console(soft_wrap=True, highlight=False)
    devices = f"{options.devices} device{'s' if options.devices > 1 else ''}"
    console.print(f"{options.strategy} on {devices}, {options.microbatches} microbatches, {result['steps']} steps")
    if result["versions"]:
        console.print("schedule proved: every unit of work once, no deadlock, lanes in order, stash within its bound")
        for version in result["versions"]:
            console.print(
                f"  step {version['step']} reads student version {_list(version['student'])}, "
                f"teacher version {_list(version['teacher'])}"
            )
    for problem in result["problems"]:
        console.print(f"  {problem}")
    verdict = "bit-identical to" if result["exact"] else "NOT identical to"
    stale = result["staleness"]
    which = "the reference" + (f" that reads weights {stale} step old" if stale else "")
    console.print(f"weights after {result['steps']} steps: {verdict} {which} ({' and '.join(result['transports'])})")
    if result["whole_backwards"]:
        console.print(f"backwards that stay whole: {'; '.join(result['whole_backwards'])}")


def tell_of_blocks(result: dict[str, Any]) -> None:
    """What came of training block by block, for a person."""
    console = Console(soft_wrap=True, highlight=False)
    devices = f"{result['devices']} device{'s' if result['devices'] > 1 else ''}"
    console.print(f"{result['strategy']} on {devices}, {result['steps']} batches for each block")
    for rank, words in enumerate(result["ranks"]):
        console.print(f"  rank {rank}: {words}")
    for problem in result["problems"][:_SHOWN]:
        console.print(f"  {problem}")
    if len(result["problems"]) > _SHOWN:
        console.print(f"  and {len(result['problems']) - _SHOWN} more")
    which = f"each block trained alone ({' and '.join(result['transports'])})"
    if result["exact"]:
        verdict = f"bit-identical to {which}"
    elif result["problems"]:
        verdict = f"NOT those of {which}"
    else:
        verdict = f"those of {which}"
    console.print(f"weights after {result['steps']} batches: {verdict}")
    if result["rows_split"]:
        console.print(
            "ranks share the rows of a batch, so sums are rounded in another order: compared in float64 with batch norm frozen, "
            f"largest relative difference {result['max_relative_difference']:.1e}, at most {result['tolerance']:g} is rounding"
        )


def _list(versions: tuple[int, ...]) -> str:
    return ", ".join(map(str, versions)) or "none"
