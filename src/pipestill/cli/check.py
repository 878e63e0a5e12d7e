"""`pipestill check RECIPE --strategy S --devices N`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from pipestill.cli.options import Helped, parse, recipe_and_rest, refuse
from pipestill.errors import ConfigError
from pipestill.recipes.run import RunOptions
from pipestill.runtime.world import choose_device_type
from pipestill.verify import TRANSPORTS, verify


@dataclass(frozen=True)
class CheckOptions:
    """What is checked.

    Args:
        steps: updates after which the weights are compared
        transport: ranks that take turns in one process, one process a rank, or both
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
    result = verify(recipe, options, steps=wanted.steps, transports=transports, device_type=device_type)
    if wanted.json:
        print(json.dumps(result))
        return 0 if result["exact"] else 1
    console = Console(soft_wrap=True, highlight=False)
    devices = f"{options.devices} device{'s' if options.devices > 1 else ''}"
    console.print(f"{options.strategy} on {devices}, {options.microbatches} microbatches, {wanted.steps} steps")
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
    console.print(f"weights after {wanted.steps} steps: {verdict} {which} ({' and '.join(transports)})")
    if result["whole_backwards"]:
        console.print(f"backwards that stay whole: {'; '.join(result['whole_backwards'])}")
    return 0 if result["exact"] else 1


def _list(versions: tuple[int, ...]) -> str:
    return ", ".join(map(str, versions)) or "none"
