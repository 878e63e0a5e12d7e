"""What a trainer needs of a kind of training: an `Engine` for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from pipestill.errors import ConfigError, PlanError, nearest
from pipestill.runtime.batch import Batch
from pipestill.runtime.transport.protocol import Waiting, World
from pipestill.schedule import Trace
from pipestill.train.callbacks import Reporter
from pipestill.train.data import Again
from pipestill.train.options import TrainerOptions
from pipestill.train.state import State

REFERENCE = "reference"
"""The strategy of every kind of training that is a plain loop on one device, without a schedule."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class FirstBatch:
    """What all ranks know of the first batch."""

    rows: int
    sample: tuple[Any, Any]
    """The inputs and targets of a few rows."""
    whole: Batch | None
    """The batch itself on rank 0, None elsewhere."""


@dataclass(frozen=True)
class Run:
    """One call of `Trainer.fit`: what an engine trains with."""

    world: World
    contracts: Any
    """What the engine's `contracts` gave."""
    plan: Any
    """What the engine's `plan` gave; None for the plain loop."""
    data: Again
    """Each call reads the training data anew."""
    validation: Again | None
    """The validation data likewise, on rank 0 only."""
    validates: bool
    reporter: Reporter
    """Tells the callbacks, on rank 0; silent elsewhere."""
    cleanup: ExitStack
    """Is left when the run is over, or has failed."""


@dataclass(frozen=True)
class Figures:
    """What an engine knows of a run that is over; see `Result`. The defaults are those of a plain loop."""

    steps: int
    samples: int
    seconds: float
    seconds_per_step: float
    metrics: dict[str, float]
    losses: dict[str, float]
    staleness: int = 0
    utilisation: float = 1.0
    bubble: float = 0.0
    predicted_seconds_per_step: float | None = None
    limit_seconds_per_step: float | None = None
    exact: bool | str = True
    whole_backwards: tuple[str, ...] = ()
    traces: tuple[Trace, ...] = ()


class Rank(Protocol):
    """One rank of a run."""

    def run(self) -> Waiting:
        """Train over all of the data; yields the message that it waits for."""


class Engine(Protocol):
    """One kind of training, for the task and the options of one trainer. Making one raises what is wrong with these.

    A trainer asks for `contracts`, then for a `plan` from costs (`measure` gives them where the user does not), and then
    either for a `plain` run or for the `ranks` of this process, which it drives to their end, and for what they trained
    (`collect`).
    """

    options: TrainerOptions
    strategy: str
    """The one that was chosen, or the default of this kind of training."""

    @property
    def validates(self) -> bool:
        """Whether the student can be validated while it is trained."""

    @property
    def models(self) -> Sequence[nn.Module]:
        """Every module that takes part; each is given back in the mode in which it came."""

    @property
    def num_readings(self) -> int:
        """How often one pass over the data reads the loader: some strategies read it anew for every block."""

    @property
    def num_passes(self) -> int:
        """How many steps callbacks are told of for each batch: some strategies train one block after the other."""

    def split(self, item: Any) -> tuple[Any, Any]:
        """What the loader yields -> inputs and targets; `DataError` for what cannot be."""

    def function_problems(self) -> Iterator[str]:
        """What the user's functions of the step do wrong at the first one."""

    def contracts(self, sample: tuple[Any, Any]) -> Any:
        """What crosses each boundary, found out with a few rows; raises `UserError`s for what cannot work."""

    def measure(self, world: World, contracts: Any, first: FirstBatch) -> Any:
        """Measured costs, the same on every rank; called on all of them together."""

    def assumed_costs(self, rows: int) -> Any:
        """Costs that stand in for measured ones where only what a plan may not be is looked for."""

    def plan(self, costs: Any, rows: int, *, memory_bytes: float | None = None) -> Any:
        """The plan for batches of so many rows; `PlanError` where there is none, or none that fits into the memory."""

    def splits_rows(self, plan: Any) -> bool:
        """Whether ranks share rows of what they train, so that sums of gradients are rounded in another order."""

    def plain_options(self, plan: Any) -> dict[str, Any]:
        """Arguments of a trainer whose plain loop reads and writes the versions of weights that the plan declares."""

    def plain(self, run: Run) -> Figures:
        """Train by the plain loop."""

    def ranks(self, run: Run) -> Sequence[Rank]:
        """The ranks that live in this process, ready to run."""

    def collect(self, run: Run, ranks: Sequence[Any], seconds: float) -> Figures:
        """Put the models back on the CPU, trained and whole on every process; the figures are complete on rank 0."""

    def state(self) -> State:
        """What has to be kept to go on from here: between runs, or in a callback of the plain loop."""

    def load_state(self, state: State) -> None:
        """Put the models into a state; the next run starts with its optimizers and its step. `ModelError` for other models."""


def chosen_strategy(options: TrainerOptions, strategies: Iterable[str], default: str) -> str:
    """The strategy's name.

    `ConfigError` for one that this kind of training lacks, `PlanError` for the plain loop on several devices.
    """
    name = default if options.strategy is None else options.strategy
    names = (REFERENCE, *strategies)
    if name not in names:
        kind = type(options.task).__name__
        raise ConfigError(f"no strategy '{name}' for {kind}{nearest(name, names)}; there are {', '.join(names)}")
    if name == REFERENCE and options.devices > 1:
        raise PlanError(f"strategy 'reference' runs on one device, not {options.devices}; choose another, or devices=1")
    return name
