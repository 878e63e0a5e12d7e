"""What tells the two kinds of costs apart, pipelines and blockwise training; and what a search reports."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from pipestill.recipes.run_options import Kind

WHAT: dict[Kind, str] = {"pipeline": "pipelines", "blockwise": "blocks that are trained alone"}
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
    "blockwise": "is for pipelines, and these costs are of blocks that are trained alone; leave it out",
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
