"""What commands ask of costs and of plans, whatever kind of training they are of: pipelines, or blocks trained alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from rich.console import Console

from pipestill import draw
from pipestill.recipes.run_options import Kind
from pipestill.schedule import Trace

if TYPE_CHECKING:
    from pipestill.compare.figures import Comparison
    from pipestill.compare.virtual import VirtualOptions  # which loads torch

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


class Knobs(Protocol):
    """What is planned, beside the costs."""

    @property
    def devices(self) -> int: ...
    @property
    def strategy(self) -> str | None: ...
    @property
    def microbatches(self) -> int: ...
    @property
    def staleness(self) -> int | None: ...
    @property
    def memory(self) -> int | None: ...


class MoreKnobs(Knobs, Protocol):
    """What one plan is made with, beside the costs."""

    @property
    def split_backward(self) -> bool: ...
    @property
    def stash(self) -> int | str | None: ...
    @property
    def run_ahead(self) -> int | None: ...


class PlanReport(Protocol):
    """A plan, with what commands show of it."""

    @property
    def title(self) -> str:
        """The plan in a few words."""

    @property
    def trace_files(self) -> list[str]:
        """Names of the trace files in the directory of a run with this plan."""

    def figures(self) -> dict[str, Any]:
        """What is predicted, for JSON."""

    def picture(self, path: Path, title: str, num_steps: int | None, unit: draw.Unit) -> None:
        """Draw what is predicted."""

    def tell(self, console: Console, title: str, unit: draw.Unit, schedule: bool) -> None:
        """Print what is predicted, and the schedule too where it is asked for."""

    def run_picture(self, traces: Sequence[Trace], path: Path, num_steps: int) -> None:
        """Draw what happened in a run, beside what was predicted."""

    def run_figures(self, traces: Sequence[Trace], summary: dict[str, Any], files: Sequence[Path]) -> dict[str, Any]:
        """What happened in a run, for JSON, from its traces, its summary.json and the files of the traces."""

    def tell_run(self, console: Console, figures: dict[str, Any]) -> None:
        """Print what happened in a run, from the figures."""


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


class Planner(Protocol):
    """Costs of one kind of training, with what commands do with them."""

    kind: ClassVar[Kind]

    @property
    def strategies(self) -> tuple[str, ...]:
        """Names of strategies that can be planned with such costs."""

    @property
    def num_blocks(self) -> str:
        """How many blocks the costs are of, in words."""

    def search(self, options: Knobs, progress: Callable[[str], object]) -> SearchReport:
        """Plan every strategy, or every variant of the one that the options name; `progress` hears what is planned."""

    def make(self, options: MoreKnobs) -> PlanReport:
        """Plan one strategy (default: that of the kind)."""

    def save(self, path: str) -> None:
        """Write the costs to a file."""

    def figures(self, microbatches: int) -> dict[str, Any]:
        """The costs, for JSON; those of pipelines are of one of so many microbatches."""

    def tell(self, console: Console, devices: int) -> None:
        """Print the costs, which were measured with so many processes."""

    def compare(self, options: VirtualOptions, microbatches: int) -> Comparison:
        """Compare strategies on virtual devices, which wait for as long as the costs say."""
