"""An `Engine` is what a trainer needs of one kind of training."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from pipestill.arguments import one_of, raise_problems
from pipestill.errors import ConfigError, PlanError, nearest
from pipestill.model.first_look import FirstLook
from pipestill.optim import Schedules
from pipestill.runtime.batch import Batch
from pipestill.runtime.transport.protocol import Waiting, World
from pipestill.train.callbacks import Reporter
from pipestill.train.data import DataOpener, split_item
from pipestill.train.options import TrainerOptions
from pipestill.train.result import Figures
from pipestill.train.state import RunState, State

REFERENCE = "reference"
"""The strategy of every kind of training that is a plain loop on one device, without a schedule."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class FirstBatch:
    """The facts about the first batch that all ranks have."""

    rows: int
    sample: tuple[Any, Any]
    """The inputs and targets of a few rows."""
    whole: Batch | None
    """The batch itself on rank 0, None elsewhere."""


@dataclass(frozen=True)
class Run:
    """One call of `Trainer.fit`: everything that an engine trains with."""

    world: World
    contracts: Any
    """What the engine's `contracts` gave."""
    plan: Any
    """What the engine's `plan` gave; None for the plain loop."""
    data: DataOpener
    """Each call reads the training data anew."""
    validation: DataOpener | None
    """The validation data likewise, on rank 0 only."""
    validates: bool
    reporter: Reporter
    """Calls the callbacks, on rank 0; elsewhere it has none."""
    cleanup: ExitStack
    """Closes what the engine has opened, when the run is over or has failed."""


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

    expected_costs: ClassVar[tuple[type, str]] = (object, "what measure gives, or None to measure it")
    """The class of this kind's costs, and what a message says that `costs` should be."""
    lacks: ClassVar[Sequence[str]] = ()
    """The options that have no meaning for this kind."""
    strategies: ClassVar[Mapping[str, str]]
    """The names of this kind's strategies, each with a line of help."""
    default_strategy: ClassVar[str]
    validates: ClassVar[bool]
    """Whether the student can be validated while it is trained."""
    num_readings: int = 1
    """How often one pass over the data reads the loader: some strategies read it anew for every block."""
    num_passes: int = 1
    """How many steps callbacks are called with for each batch: some strategies train one block after the other."""
    options: TrainerOptions
    task: Any
    strategy: str
    """The one that was chosen, or the default of this kind of training."""
    run_state: RunState

    def __init__(self, options: TrainerOptions) -> None:
        costs_class, expected = self.expected_costs
        no_use = (f"{name} is for models that are trained as a whole; leave it out" for name in options.given(self.lacks))
        raise_problems([*one_of("costs", options.costs, (costs_class, type(None)), expected), *no_use])
        self.options = options
        self.task = options.task
        self.run_state = RunState()
        self.strategy = self.default_strategy if options.strategy is None else options.strategy
        names = (REFERENCE, *self.strategies)
        if self.strategy not in names:
            what = f"no strategy '{self.strategy}' for {type(options.task).__name__}{nearest(self.strategy, names)}"
            raise ConfigError(f"{what}; there are {', '.join(names)}")
        if self.strategy == REFERENCE and options.devices > 1:
            raise PlanError(f"strategy 'reference' runs on one device, not {options.devices}; choose another, or devices=1")

    @property
    def models(self) -> Sequence[nn.Module]:
        """Every module that takes part; each is given back in the mode in which it came."""

    @property
    def changed_modules(self) -> Mapping[str, nn.Module]:
        """The modules that training changes, by the names that their tensors have in a `State`."""

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """All parameters that optimizers train, by name."""

    @cached_property
    def schedules(self) -> Schedules:
        """The learning rates and weight decays of every optimizer, as they follow the step."""
        return self.options.schedules(self.trained)

    def function_problems(self) -> Iterator[str]:
        """Yield the problems that the user's functions of the step have at the first one."""
        yield from self.schedules.problems()

    def split(self, item: Any) -> tuple[Any, Any]:
        """Split what the loader yields into inputs and targets; `DataError` for what cannot be."""
        return split_item(self.options.split_batch, item, "what the loader gave")

    def counts(self, targets: Any) -> Mapping[str, float]:
        """Count how much of a loss a batch's targets are, by part; none where all parts are means over rows."""
        return {}

    def contracts(self, sample: tuple[Any, Any]) -> Any:
        """Find out what crosses each boundary with a few rows; raises `UserError`s for what cannot work."""

    def measure(self, world: World, contracts: Any, first: FirstBatch) -> Any:
        """Measure costs, the same on every rank; called on all of them together."""

    def check_rows(self, first: FirstBatch, sizes: Collection[int]) -> None:
        """Raise the `UserError`s of batches with so many rows, those that are known beforehand, besides those of the first."""
        return

    def look(self, first: FirstBatch) -> FirstLook:
        """Look at the losses on a few rows of the first batch before the first step; called on rank 0."""
        return FirstLook()

    def assumed_costs(self, rows: int) -> Any:
        """Costs that stand in for measured ones where a plan is only checked."""

    def plan(self, costs: Any, rows: int, *, memory_bytes: float | None = None) -> Any:
        """Make the plan for batches of so many rows; `PlanError` where there is none, or none that fits into the memory."""

    def check_plan(self, plan: Any, contracts: Any) -> None:
        """Raise the `UserError`s of a plan that does not fit what `contracts` found out."""

    def splits_rows(self, plan: Any) -> bool:
        """Whether ranks share rows of what they train, so that sums of gradients are rounded in another order."""
        return False

    def plain_options(self, plan: Any) -> dict[str, Any]:
        """Arguments of a trainer whose plain loop reads and writes the versions of weights that the plan declares."""
        return {}

    def plain(self, run: Run) -> Figures:
        """Train by the plain loop."""

    def ranks(self, run: Run) -> Sequence[Rank]:
        """Make the ranks that live in this process, ready to run, whose models are copies of those of rank 0."""

    def collect(self, run: Run, ranks: Sequence[Any], seconds: float) -> Figures:
        """Put the models back on the CPU, trained and whole on every process; the figures are complete on rank 0."""

    def state(self) -> State:
        """Copy what has to be kept to go on from here: between runs, or in a callback of the plain loop."""
        return self.run_state.take(self.changed_modules)

    def load_state(self, state: State) -> None:
        """Put the models into a state; the next run starts with its optimizers and its step. `ModelError` for other models."""
        self.run_state.give(self.changed_modules, state)
