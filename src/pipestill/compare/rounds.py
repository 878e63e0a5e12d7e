"""The order in which strategies are measured: in turn, several rounds over."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

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
