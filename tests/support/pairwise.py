"""Products of test parameters, thinned out so that every pair of values still meets."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest

Pair = tuple[tuple[int, int], tuple[int, int]]
"""Two parameters, each as (its place, the place of its value)."""


def pairwise(**values: Iterable[Any]) -> tuple[tuple[str, ...], list[Any]]:
    """All combinations of some parameters, for `pytest.mark.parametrize(*pairwise(...))`.

    The combinations that are needed for every pair of values to occur are ordinary tests. All others are marked slow: a
    mistake that takes three particular values to show is rare, and they find it in `make slow`.
    """
    choices = {name: list(given) for name, given in values.items()}
    needed = covering([len(given) for given in choices.values()])
    rows = product(*(range(len(given)) for given in choices.values()))
    return tuple(choices), [
        pytest.param(
            *(given[place] for given, place in zip(choices.values(), row, strict=True)),
            marks=() if row in needed else pytest.mark.slow,
        )
        for row in rows
    ]


def every_other(rows: Iterable[Any], others: int = 1) -> list[Any]:
    """Values of one parameter (or tuples of several) for `parametrize`: after each ordinary one, so many are marked slow."""
    marked = []
    for place, row in enumerate(rows):
        if place % (others + 1):
            marked.append(pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.slow))
        else:
            marked.append(row)
    return marked


def covering(sizes: list[int]) -> set[tuple[int, ...]]:
    """Few of all rows (one place for each parameter) that hold every pair of places of two parameters.

    Greedy: the next row is the first of those that hold the most pairs not held yet.
    """
    rows = list(product(*map(range, sizes)))
    missing = {pair for row in rows for pair in pairs_of(row)}
    taken = set()
    while missing:
        best = max(rows, key=lambda row: len(missing.intersection(pairs_of(row))))
        missing.difference_update(pairs_of(best))
        taken.add(best)
    return taken


def pairs_of(row: tuple[int, ...]) -> list[Pair]:
    """All pairs of two parameters' values in one row; of a single parameter, its value with itself."""
    placed = list(enumerate(row))
    return list(combinations(placed, 2)) if len(placed) > 1 else [(placed[0], placed[0])]
