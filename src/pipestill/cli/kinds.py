"""What tells the two kinds of costs apart, pipelines and blockwise training; and what a search reports."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from pipestill.cli.figures import FigureTable, say
from pipestill.plan.search import P, Search
from pipestill.recipes.run_options import Kind

WHAT: dict[Kind, str] = {"pipeline": "pipelines", "blockwise": "blockwise training"}
"""What costs of each kind are of, in words."""

OF_TASKS = ("teacher", "views", "batch_loss", "clip")
"""Options that describe the task of costs without a recipe."""

FOREIGN: dict[Kind, tuple[str, ...]] = {
    "pipeline": ("batch",),
    "blockwise": ("microbatches", "staleness", "split_backward", "stash", "run_ahead", "uniform", *OF_TASKS),
}
"""Options that costs of each kind have no use for."""

WHY_FOREIGN: dict[Kind, str] = {
    "pipeline": "is for a CSV of blocks (--costs FILE.csv), and these costs are of a pipeline; leave it out",
    "blockwise": "is for pipelines, and these costs are of blockwise training; leave it out",
}


@dataclass(frozen=True)
class SearchReport:
    """What a search considered and chose, as commands show it."""

    figures: dict[str, Any]
    """For JSON."""
    plan: dict[str, Any]
    """The chosen plan, as its file holds it."""
    keys: dict[str, Any]
    """What makes 'train' follow the chosen plan, by option."""
    tell: Callable[[Console], None]
    """Prints the search for a person."""


def considered_figures(found: Search[P], figures: Callable[[P], dict[str, Any]]) -> list[dict[str, Any]]:
    """Give what a search considered, for JSON: the figures of each plan, or why there is none."""
    return [
        {"name": one.name, "chosen": one is found.chosen} | ({"refused": one.refused} if one.plan is None else figures(one.plan))
        for one in found.considered
    ]


def tell_considered(found: Search[P], console: Console, titles: Sequence[str], cells: Callable[[P], list[str]]) -> None:
    """Print what a search considered: a table with the cells of each plan, then why strategies were refused."""
    table = FigureTable("strategy", *titles, "")
    for one in found.considered:
        if one.plan is None:
            table.add_row(one.name, *("" for _ in titles), "refused")
        else:
            table.add_row(one.name, *cells(one.plan), "<- chosen" if one is found.chosen else "")
    table.show(console)
    for one in found.considered:
        if one.plan is None:
            say(console, f"{one.name}: {one.refused}")
