"""A comparison of strategies, for a person."""

from typing import Any

from rich.console import Console

from pipestill.cli.figures import FigureTable, say


def show(figures: dict[str, Any], console: Console) -> None:
    """Print the comparison: a row for each strategy, then what the machine can do and what the columns mean."""
    calibration, results = figures["calibration"], figures["results"]
    _table(results).show(console)
    if any("plan" in result for result in results):
        _tell_of_blocks(calibration, results, console)
    else:
        _tell_of_pipelines(calibration, results, console)


def _tell_of_pipelines(calibration: dict[str, Any], results: list[dict[str, Any]], console: Console) -> None:
    if calibration.get("virtual"):
        machine = (
            "Virtual devices: processes and messages are real, work waits. On this machine a trivial pipeline reaches "
            f"{calibration['share_of_ideal']:.1%} (+-{_half(calibration['share_of_ideal_spread']):.1%}) of its ideal; clocks "
            f"were set back by {calibration['late']:.1%} for waits that ended late."
        )
    else:
        machine = f"This machine: a step of the plain loop takes {_ceiling(calibration)}"
    say(
        console,
        f"{machine} Speedups are over {results[0]['strategy']}; stash is in units (a microbatch in one view) of the rank "
        "that holds most; stale is how many steps old the weights are that a step reads.",
    )


def _tell_of_blocks(calibration: dict[str, Any], results: list[dict[str, Any]], console: Console) -> None:
    """Print who trains what, and what the machine can do."""
    for result in results:
        ranks = result.get("plan", [])
        if result["strategy"] == "dp":
            say(console, "dp: all ranks train one block after the other, on equal parts of the rows")
        elif ranks:
            say(console, f"{result['strategy']}:")
            for rank, line in enumerate(ranks):
                say(console, f"  rank {rank}: {line}")
    limit = min(result["limit_seconds_per_step"] for result in results if "plan" in result)
    least = f"all work once, divided evenly, would take {limit * 1e3:.1f} ms"
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
            f"{_ceiling(calibration)}"
        )
    say(console, f"{machine} Speedups are over {results[0]['strategy']}.")


def _ceiling(calibration: dict[str, Any]) -> str:
    """Say how fast the plain loop is alone and beside others, and how fast any strategy can be therefore."""
    return (
        f"{calibration['alone_seconds_per_step'] * 1e3:.1f} ms alone and "
        f"{calibration['together_seconds_per_step'] * 1e3:.1f} ms in {calibration['devices']} processes at once, so no way to "
        f"divide the work can be more than {calibration['ceiling']:.2f} times as fast "
        f"(+-{_half(calibration['ceiling_spread']):.2f}). MiB is the peak of the largest rank."
    )


def _table(results: list[dict[str, Any]]) -> FigureTable:
    """Make the table; what follows +- is half the range of the rounds."""
    real = any("share_of_ceiling" in result for result in results)
    names = ("strategy", "ms a step", "predicted", "speedup", *(("of ceiling",) if real else ()))
    table = FigureTable(*names, "busy", "expected", "stash", "stale", *(("MiB",) if real else ()))
    for result in results:
        predicted = result.get("predicted_seconds_per_step")
        spread = [s * 1e3 for s in result["seconds_per_step_spread"]]
        cells = [
            result["strategy"],
            f"{result['seconds_per_step'] * 1e3:.1f} +-{_half(spread):.1f}",
            f"{predicted * 1e3:.1f}" if predicted else "",
            f"{result['speedup']:.2f} +-{_half(result['speedup_spread']):.2f}",
            *([f"{result['share_of_ceiling']:.0%}"] if real else []),
            f"{result['utilisation']:.1%}" if "utilisation" in result else "",
            f"{result['predicted_utilisation']:.1%}" if "predicted_utilisation" in result else "",
            str(max(result["stash_peak"])) if "stash_peak" in result else "",
            str(result["staleness"]) if "staleness" in result else "",
            *([f"{max(result['peak_memory_bytes']) / 2**20:.0f}"] if real else []),
        ]
        table.add_row(*cells)
    return table


def _half(spread: list[float]) -> float:
    return (spread[1] - spread[0]) / 2
