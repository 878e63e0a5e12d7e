"""A workload on the ranks of this machine, ready to be trained by one strategy after the other."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, ClassVar

from pipestill.compare.figures import PlainLoop
from pipestill.compare.variants import options_of
from pipestill.costs import Link
from pipestill.model.nests import num_rows
from pipestill.recipes.recipe import Workload
from pipestill.recipes.run_options import RunOptions
from pipestill.runtime.transport.protocol import World
from pipestill.runtime.world import OneProcess
from pipestill.train.data import inputs_and_targets
from pipestill.train.result import Result
from pipestill.train.trainer import Trainer


class WholeBatches:
    """The batches of a loader that have as many rows as its first one, so that all steps do the same work."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.first = inputs_and_targets(next(iter(loader)))
        self.rows = num_rows(self.first[0], "the first batch")

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        pairs = map(inputs_and_targets, self.loader)
        return (pair for pair in pairs if num_rows(pair[0], "a batch") == self.rows)


@dataclass(frozen=True)
class Round:
    """One strategy in one round; `result` is None for a peer, which no trainer of ours runs."""

    seconds_per_step: float
    peak_memory_bytes: list[int]
    result: Result | None = None


class Bench(ABC):
    """Measures strategies that train one workload; a subclass for each kind of training says what is particular to it.

    Methods that train or measure are called on all ranks together. Costs are those of the kind: `Costs` or `BlockProfile`.
    """

    plain_strategy: ClassVar[str]
    """Name of the strategy that does all work of a step once, in one process."""
    measuring_strategy: ClassVar[str]
    """Name of a strategy that has every knob on which the measured costs depend."""

    def __init__(self, workload: Workload, options: RunOptions, world: World, steps: int) -> None:
        self.workload = workload
        self.options = options
        self.world = world
        self.steps = steps
        self.batches = WholeBatches(workload.loader)

    def trainer(self, options: RunOptions, **others: Any) -> Trainer:
        """Make the trainer of fresh models; `others` are arguments of it that replace those of the options."""
        return self.workload.trainer(self.workload.task(), options, **{"first_look": False, **others})

    def variant(self, name: str, costs: Any) -> Trainer:
        """Make the trainer of fresh models by the named variant."""
        return self.trainer(options_of(name, self.options, self.workload.strategies), costs=costs)

    def costs(self, names: Iterable[str]) -> Any:
        """The costs of the blocks for the named variants: the user's, or what is measured here."""
        split = any(options_of(name, self.options, self.workload.strategies).split_backward for name in names)
        trainer = self.trainer(replace(self.options, strategy=self.measuring_strategy, split_backward=split))
        return trainer.costs or trainer.measure(self.batches)

    def plain_loop(self, costs: Any) -> PlainLoop:
        """Measure what a step without a schedule takes at this moment."""
        return PlainLoop(self.plain_seconds(costs, everywhere=False), self.plain_seconds(costs, everywhere=True))

    def plain_seconds(self, costs: Any, *, everywhere: bool) -> float:
        """Measure the slowest process's seconds a step without a schedule, in all processes at once or in rank 0's alone."""
        self.world.barrier()
        seconds = 0.0
        if everywhere or self.world.is_main:
            trainer = self.trainer(replace(self.options.as_reference(), strategy=self.plain_strategy), costs=costs)
            seconds = trainer.fit(self.batches, steps=self.steps, world=OneProcess(1)).seconds_per_step
        return self.world.broadcast(max(self.world.gather([seconds]), default=None))

    def run(self, name: str, costs: Any) -> Round:
        """Train fresh models by the named variant."""
        self.world.barrier()
        trainer = self.variant(name, costs)
        result = trainer.fit(self.batches, steps=self.steps_of(trainer, costs))
        return Round(result.seconds_per_step, result.peak_memory_bytes, result)

    def steps_of(self, trainer: Trainer, costs: Any) -> int:
        """The number of steps to train: as many as asked for, or as many as show a steady state."""
        return self.steps

    def figures(self, rounds: Sequence[Round], costs: Any) -> dict[str, Any]:
        """Figures of one strategy's rounds beside their times, and those that its plan promises under `costs`."""
        figures: dict[str, Any] = {"peak_memory_bytes": rounds[-1].peak_memory_bytes}
        results = [r.result for r in rounds if r.result is not None]
        if results:
            figures["utilisation"] = median(result.utilisation for result in results)
            figures["bubble"] = median(result.bubble for result in results)
        if results and results[-1].plan is not None:
            figures |= self.plan_figures(results[-1], costs)
        return figures

    @abstractmethod
    def link(self, loop: PlainLoop, costs: Any) -> Link:
        """The link between ranks at this moment, where a plain step takes as long as `loop` says."""

    @abstractmethod
    def calibrated(self, costs: Any, loops: Sequence[PlainLoop], links: Sequence[Link]) -> Any:
        """Costs that agree with what was seen of the machine."""

    @abstractmethod
    def plan_figures(self, result: Result, costs: Any) -> dict[str, Any]:
        """Figures of the plan that was run, among them how long a step should take under `costs`."""

    @abstractmethod
    def calibration(self, costs: Any) -> dict[str, Any]:
        """Figures of calibrated costs."""
