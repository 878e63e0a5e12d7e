"""The trainer: from a task and a loader to a trained student, on any number of devices."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pipestill.arguments import check_extent, hinted, raise_problems, shown
from pipestill.costs import Costs
from pipestill.errors import ConfigError
from pipestill.model.blockwise.task import Blockwise
from pipestill.model.tasks import Distillation, Momentum, Supervised
from pipestill.runtime.memory import peak_bytes, reset_peak
from pipestill.runtime.world import OneProcess, World, device_of, join_world
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.train.blockwise import BlockwiseEngine
from pipestill.train.callbacks import Reporter
from pipestill.train.data import Again, Reader, SplitBatch, check_loader, sample, total_steps
from pipestill.train.engine import REFERENCE, Engine, FirstBatch, Run
from pipestill.train.options import TrainerOptions
from pipestill.train.pipeline import PipelineEngine
from pipestill.train.result import Result

ENGINES: dict[type, Any] = {
    Distillation: PipelineEngine,
    Momentum: PipelineEngine,
    Supervised: PipelineEngine,
    Blockwise: BlockwiseEngine,
}
"""The engine of each kind of task. A further kind of training is one more line."""


@hinted
@dataclass(frozen=True, eq=False, repr=False)
class Trainer(TrainerOptions):
    """Trains the student of a task."""

    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = next((engine for task, engine in ENGINES.items() if isinstance(self.task, task)), None)
        if kind is None:
            known = ", ".join(task.__name__ for task in ENGINES)
            raise ConfigError(f"the task is {shown(self.task)}; expected one of {known}")
        object.__setattr__(self, "engine", kind(self))
        object.__setattr__(self, "strategy", self.engine.strategy)

    @property
    def student(self) -> nn.Module:
        """The unsplit student, on the CPU; the very module that the task was given."""
        student: nn.Module = self.task.student
        return student

    @hinted
    def fit(
        self,
        loader: Iterable[Any],
        *,
        epochs: int | None = None,
        steps: int | None = None,
        validate: Iterable[Any] | None = None,
        description: str = "train",
        world: World | None = None,
    ) -> Result:
        """Train."""
        if epochs is None and steps is None:
            epochs = 1
        check_extent(epochs, steps)
        passes = epochs if steps is None and epochs else 1
        check_loader(loader, passes * self.engine.num_readings)
        if validate is not None:
            if not self.engine.validates:
                raise ConfigError(
                    f"{type(self.task).__name__} has no validation, for its blocks are trained alone; leave out validate, and "
                    "evaluate the student afterwards"
                )
            check_loader(validate, passes, "the validation loader")
        raise_problems(self.engine.function_problems())
        world = self._world(world)
        with Reporter(self.callbacks if world.is_main else ()) as reporter, ExitStack() as cleanup:
            cleanup.enter_context(_modes_kept(self.engine.models))
            data = Again(cleanup, lambda: self._reader(loader, epochs, steps))
            first = self._first(world, data)
            contracts = self.engine.contracts(first.sample)
            plan = None if self.strategy == REFERENCE else self._plan(world, contracts, first)
            total = total_steps(loader, epochs, steps)
            reporter.start(description, None if total is None else total * self.engine.num_passes)
            validation = None
            if validate is not None and world.is_main:
                validation = Again(cleanup, lambda: self._reader(validate, 1, None, self.split_batch))
            run = Run(world, contracts, plan, data, validation, validate is not None, reporter, cleanup)
            return self._train(run)

    def _train(self, run: Run) -> Result:
        """Do the run, by the plain loop or on the ranks of its world."""
        world = run.world
        devices = [device_of(rank, self.device_type) for rank in world.ranks]
        for device in devices:
            reset_peak(device)
        if run.plan is None:
            figures, backend = self.engine.plain(run), self.device_type
        else:
            ranks = self.engine.ranks(run)
            world.barrier()
            start = time.perf_counter()
            world.drive([rank.run() for rank in ranks])
            world.barrier()
            figures = self.engine.collect(run, ranks, time.perf_counter() - start)
            backend = world.backend(self.device_type)
        assert self.strategy is not None
        return Result(
            strategy=self.strategy, devices=self.devices, backend=backend, plan=run.plan,
            peak_memory_bytes=world.gather([peak_bytes(device) for device in devices]), **vars(figures),
        )  # fmt: skip

    def preflight(self, loader: Iterable[Any]) -> None:
        """Raise the `UserError`s that `fit` would, from the first batch and without training or measuring anything."""
        check_loader(loader, 1)
        raise_problems(self.engine.function_problems())
        with ExitStack() as cleanup:
            first = self._first(OneProcess(1), Again(cleanup, lambda: self._reader(loader, 1, 1)))
            self.engine.contracts(first.sample)
            if self.strategy == REFERENCE:
                return
            if self.costs is None:  # what blocks hold in memory is not known before they are measured
                self.engine.plan(self.engine.assumed_costs(first.rows), first.rows)
            else:
                self.engine.plan(self.costs, first.rows, memory_bytes=self.memory_bytes)

    def measure(self, loader: Iterable[Any], *, world: World | None = None) -> Costs | BlockProfile:
        """Measure."""
        world = self._world(world)
        with ExitStack() as cleanup:
            first = self._first(world, Again(cleanup, lambda: self._reader(loader, 1, 1)))
            measured: Costs | BlockProfile = self.engine.measure(world, self.engine.contracts(first.sample), first)
            return measured

    def plan(self, loader: Iterable[Any], *, world: World | None = None) -> Any:
        """Plan."""
        if self.strategy == REFERENCE:
            return None
        world = self._world(world)
        with ExitStack() as cleanup:
            first = self._first(world, Again(cleanup, lambda: self._reader(loader, 1, 1)))
            return self._plan(world, self.engine.contracts(first.sample), first)

    def _plan(self, world: World, contracts: Any, first: FirstBatch) -> Any:
        """The same plan on every rank, from the costs that were given, or measured here."""
        costs = world.broadcast(self.costs or self.engine.measure(world, contracts, first))
        return self.engine.plan(costs, first.rows, memory_bytes=self.memory_bytes)

    def _world(self, given: World | None) -> World:
        if self.strategy == REFERENCE:
            return OneProcess(1)
        return given or join_world(self.devices, self.device_type, self.timeout_seconds)

    def _reader(
        self, loader: Iterable[Any], epochs: int | None, steps: int | None, split_batch: SplitBatch | None = None
    ) -> Reader:
        return Reader(
            loader, epochs=epochs, steps=steps, seed=self.seed, split_batch=split_batch or self.engine.split,
            length_axis=self.length_axis, timeout_seconds=self.timeout_seconds,
        )  # fmt: skip

    def _first(self, world: World, data: Again) -> FirstBatch:
        """Look at the first batch on rank 0, and tell all ranks what they need to know of it."""
        batch = data.peek() if world.is_main else None
        few = world.broadcast(sample(batch) if batch else None)
        return FirstBatch(world.broadcast(batch.rows if batch else None), few, batch)


@contextmanager
def _modes_kept(models: Iterable[nn.Module]) -> Iterator[None]:
    """Give every module back in the train or eval mode in which it came."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
