"""Rounds in which strategies are measured in turn, and the figures of a comparison that come from their seconds."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median
from typing import Any, TypeVar

from pipestill.costs import Costs, Link
from pipestill.schedule import Trace


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison: what `compare --json` prints, and each strategy's trace of the last round."""

    figures: dict[str, Any]
    traces: dict[str, Trace]


@dataclass(frozen=True, slots=True)
class PlainLoop:
    """Seconds that a step without any schedule takes, measured at one moment.

    Args:
        alone_seconds: in one process, while the others wait
        together_seconds: in the slowest of as many independent processes at once as there are devices
    """

    alone_seconds: float
    together_seconds: float

    def ceiling(self, devices: int) -> float:
        """Compute how many times as fast as one process `devices` of them can be on this machine: no strategy is faster."""
        return devices * self.alone_seconds / self.together_seconds


def around_rounds(loops: Sequence[PlainLoop]) -> list[PlainLoop]:
    """The plain loop of each round: the mean of what was measured before the round and after it."""
    return [
        PlainLoop(mean((a.alone_seconds, b.alone_seconds)), mean((a.together_seconds, b.together_seconds)))
        for a, b in pairwise(loops)
    ]


def median_loop(loops: Sequence[PlainLoop]) -> PlainLoop:
    """The medians of both times."""
    return PlainLoop(median(loop.alone_seconds for loop in loops), median(loop.together_seconds for loop in loops))


def median_link(links: Sequence[Link]) -> Link:
    """A link with the median of each figure."""
    return Link(*(median(values) for values in zip(*map(dataclasses.astuple, links), strict=True)))


def with_spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """The median of the rounds' values, and as `NAME_spread` the least and the largest."""
    return {name: median(values), f"{name}_spread": [min(values), max(values)]}


def strategy_figures(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Compute each strategy's time and speedup from the seconds a step that it took in each round.

    Speedups are over the first strategy, each of a round over the same round, so that what slows all strategies of a
    round down falls out.
    """
    first = next(iter(seconds.values()))
    return {
        name: {
            "strategy": name,
            **with_spread("seconds_per_step", mine),
            **with_spread("speedup", [base / own for base, own in zip(first, mine, strict=True)]),
        }
        for name, mine in seconds.items()
    }


def ceiling_figures(
    seconds: Mapping[str, Sequence[float]], loops: Sequence[PlainLoop], devices: int
) -> dict[str, dict[str, Any]]:
    """Compute how near each strategy came to the machine's ceiling, round by round.

    `share_of_ceiling` is the speedup over the plain loop divided by the ceiling, `speedup_share_of_ceiling` that over the
    first strategy. `loops` holds the plain loop of each round.
    """
    first, ceilings = next(iter(seconds.values())), [loop.ceiling(devices) for loop in loops]

    def shares(baseline: Iterable[float], mine: Sequence[float]) -> list[float]:
        return [base / own / ceiling for base, own, ceiling in zip(baseline, mine, ceilings, strict=True)]

    return {
        name: {
            **with_spread("share_of_ceiling", shares([loop.alone_seconds for loop in loops], mine)),
            "speedup_share_of_ceiling": median(shares(first, mine)),
        }
        for name, mine in seconds.items()
    }


def machine_figures(loops: Sequence[PlainLoop], devices: int) -> dict[str, Any]:
    """Compute what the machine itself can do; `loops` holds the plain loop of each round."""
    middle = median_loop(loops)
    return {
        "devices": devices,
        "rounds": len(loops),
        "alone_seconds_per_step": middle.alone_seconds,
        "together_seconds_per_step": middle.together_seconds,
        **with_spread("ceiling", [loop.ceiling(devices) for loop in loops]),
    }


def calibrated(
    costs: Costs, loops: Sequence[PlainLoop], links: Sequence[Link], *, microbatches: int, teacher_views: int
) -> Costs:
    """Costs of blocks, made to agree with what all rounds measured.

    Work is scaled so that a step on one device takes as long as the plain loop did alone. Interference is how much longer
    the plain loop took in all processes at once. Links have the medians of the measured ones.
    """
    loop = median_loop(loops)
    scaled = costs.scaled(loop.alone_seconds / costs.seconds_of_step(microbatches, teacher_views))
    return scaled.with_surroundings(median_link(links), max(1.0, loop.together_seconds / loop.alone_seconds))


def enough_steps(wanted: int, fewest: int, seconds_per_step: float, long_seconds: float) -> int:
    """Choose how many steps to measure: as many as wanted, or as last `long_seconds`; never less than `fewest`."""
    return max(fewest, min(wanted, math.ceil(long_seconds / seconds_per_step)))


T = TypeVar("T")


def in_rounds(
    names: Iterable[str], rounds: int, measure: Callable[[str], T], after_round: Callable[[], None] = lambda: None
) -> dict[str, list[T]]:
    """Measure every strategy once in each round, always in the same order, so that a slow minute is slow for all.

    `after_round` is called when a round is over. Returns what `measure(name)` gave, by strategy, a value for each round.
    """
    measured: dict[str, list[T]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, values in measured.items():
            values.append(measure(name))
        after_round()
    return measured
