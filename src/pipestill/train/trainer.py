"""The trainer: from a task and a loader to a trained student, on any number of devices."""

import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pipestill.arguments import check_extent, hinted, raise_problems, shown
from pipestill.costs import Costs
from pipestill.errors import ConfigError
from pipestill.model.blockwise.task import Blockwise
from pipestill.model.first_look import FirstLook
from pipestill.model.tasks import Distillation, Momentum, Supervised
from pipestill.runtime.record import peak_bytes, reset_peak
from pipestill.runtime.transport.protocol import World
from pipestill.runtime.world import OneProcess, device_of, join_world
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.train.blockwise import BlockwiseEngine
from pipestill.train.callbacks import Reporter
from pipestill.train.data import DataOpener, Reader, batch_sizes, check_loader, sample, total_steps
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
    """Trains the student of a task, of any kind, on any number of devices, with the result that a plain loop would have.

    A trainer is a value: its arguments are checked when it is made, and none can be set later. `fit` trains. Alone, all ranks
    take turns in this process; under torchrun or `pipestill.launch`, each process is one rank. Either way `student` is the
    whole model under its own names, on every process, once `fit` returns.

    A *pipeline* trains the student of `Distillation`, `Momentum` or `Supervised` as a whole: both models are cut into stages,
    one of each on every device. *Blockwise* training, of `Blockwise`, trains every student block alone. Arguments marked
    "pipelines only" are refused for the latter.

    Args:
        task: what is trained: a `Distillation`, `Momentum`, `Supervised` or `Blockwise`.
        optimizer: a class or a function, not an instance: `optimizer(parameters, lr=lr, **optimizer_options)` is called once for
            each stage, or for each block, with its own parameters.
        lr: learning rate of every parameter group that has none of its own; at least 0.
        optimizer_options: further arguments of the optimizer, such as `{"momentum": 0.9, "weight_decay": 1e-4}`. Default: none.
        param_groups: a function from a stage's (or block's) parameters by name, `{"layer.weight": parameter, ...}`, to a list of
            parameter groups as torch's optimizers take them. Default: one group.
        lr_schedule: a function from the step, counted from 0, to a factor on every group's rate, such as
            `ps.lr_schedules.cosine(1000)`; or a factory of a torch scheduler, such as
            `lambda optimizer: CosineAnnealingLR(optimizer, 1000)`, a scheduler class or a partial of one. Anything else is a
            factory where it fails for step 0 and makes a scheduler of an optimizer. A factory is called for every
            optimizer, and its schedulers follow the step. Default: constant.
        weight_decay_schedule: pipelines only. A function from the step, counted from 0, to a factor on every group's
            weight decay. Default: constant.
        devices: number of ranks, each one device: the stages of a pipeline, or those that share the blocks.
        strategy: the schedule's name. Pipelines: "reference" (the plain loop, on one device), "sequential", "gpipe", "1f1b",
            "tspipe", "async" or "fill" (default). Blockwise: "reference", "dp", "ls", "relay", "relay-dpu", "hybrid" or
            "balanced" (default).
        microbatches: pipelines only. Slices of a batch, whose gradients add up to that of the batch's mean loss; at least 1.
            Where a batch has fewer rows, the last slices are empty and skipped.
        staleness: pipelines only, for "fill" and "reference". Updates by which a momentum teacher may be old: 0 is exact
            (default), 1 keeps devices busier.
        student_staleness: pipelines only, for "reference". 1 lets every step read the student's weights of one update before,
            as "async" does, for comparisons with it. Default: 0.
        split_backward: pipelines only, for "fill". Whether gradients of weights are computed apart from those of inputs, as work
            that fills idle time.
        stash: pipelines only, for "fill". Most microbatches that a rank keeps between forward and backward: a number, "n" (as
            many as there are stages), "2n-1" or "all". Default: "n", and "2n-1" with `split_backward`.
        run_ahead: pipelines only, for "fill". Most forwards (of one microbatch in one view) that the teacher may be ahead of the
            student. Default: as many as help.
        clip_grad_norm: pipelines only. Largest norm of all gradients together; larger ones are scaled down to it, and every
            update waits for all stages. Default: no limit.
        batch_norm: pipelines only. When running statistics of batch norms move: with every "microbatch" (default), once a batch
            ("deferred"), or never ("frozen", where they also normalise).
        student_partition: pipelines only. Number of student blocks on each device, such as [3, 2]. Default: levelled by `costs`.
        teacher_partition: pipelines only. Number of teacher blocks on each device. Default: levelled by `costs`.
        costs: what to plan with: `Costs` for pipelines, a `BlockProfile` for blockwise training (`Costs.load` and
            `BlockProfile.load` read files of `pipestill profile`). Default: measured before the first step.
        memory: most that a device may hold: a number of bytes, or text such as "80GB" or "512MiB". What needs more is refused
            before the first step. Default: no limit.
        device: "cpu" or "cuda". Default: CUDA where this machine has a device for each of its ranks.
        metrics: pipelines only. Functions `metric(output, target)` by name, each the mean over the rows that it is given; a
            validation averages them over all rows. Default: none.
        split_batch: a function from what the loader yields to (inputs, targets). Default: a pair is just that, and anything
            else is inputs without targets.
        length_axis: pipelines only. An axis, at least 1, in whose size batches may differ, such as 1 for token sequences of shape
            (rows, tokens); all tensors of a batch that have this axis share its size. Default: all batches have the same sizes.
        seed: seeds the data's order, and dropout. Initial weights are those of the models on rank 0.
        log_every: steps from one call of the callbacks' `step` to the next; the last step of an epoch is logged too.
        callbacks: `Callback`s that follow the run, on rank 0.
        first_look: whether both models' losses on a few rows are looked at before the first step, as notes to the callbacks, and
            what is likely to be a mistake is warned of, such as a teacher that does no better than guessing.
        timeout_seconds: deadline of every wait, for a batch or for another rank.

    Raises:
        UserError: with everything that is wrong with the arguments.
    """

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
        """Train for a number of passes over the data, or of steps, whichever ends first.

        Each call makes new optimizers and counts steps and epochs anew. Student and teacher are given back in the train or eval
        mode in which they came, each of their modules.

        Args:
            loader: yields batches: (inputs, targets), or inputs alone, as nests (tuples, lists, dicts) of tensors whose first
                axis counts rows. A background thread reads it, on rank 0; blockwise "reference", "dp" and "ls" read it anew for
                every block.
            epochs: passes over the loader. Default: 1, where `steps` is not given either.
            steps: updates of the student. Default: no limit.
            validate: pipelines only. A loader that is read after every epoch, to evaluate the `metrics` on. Default: none.
            description: a name for the run that callbacks show.
            world: the ranks that train. Default: those that this process is part of.

        Returns:
            what was done; complete on rank 0.

        Raises:
            UserError: before the first step, where it can be seen then that something is wrong.
        """
        if epochs is None and steps is None:
            epochs = 1
        check_extent(epochs, steps)
        passes = epochs if steps is None and epochs else 1
        check_loader(loader, passes * self.engine.num_readings)
        if validate is not None:
            if not self.engine.validates:
                raise ConfigError(
                    f"{type(self.task).__name__} has no validation while it trains; leave out validate, and "
                    "evaluate the student afterwards"
                )
            check_loader(validate, passes, "the validation loader")
        raise_problems(self.engine.function_problems())
        world = self._world(world)
        with Reporter(self.callbacks if world.is_main else ()) as reporter, ExitStack() as cleanup:
            cleanup.enter_context(_modes_kept(self.engine.models))
            data = DataOpener(cleanup, lambda: self._reader(loader, epochs, steps))
            first = self._first(world, data)
            contracts = self.engine.contracts(first.sample)
            plan = None if self.strategy == REFERENCE else self._plan(world, contracts, first)
            self.engine.check_rows(first, batch_sizes(loader, steps))
            look = self.engine.look(first) if self.first_look and world.is_main else FirstLook()
            for warning in look.warnings:
                warnings.warn(warning, stacklevel=3)
            total = total_steps(loader, epochs, steps)
            reporter.start(description, None if total is None else total * self.engine.num_passes)
            reporter.notice(look.notes)
            validation = None
            if validate is not None and world.is_main:
                validation = DataOpener(cleanup, lambda: self._reader(validate, 1, None, validates=True))
            run = Run(world, contracts, plan, data, validation, validate is not None, reporter, cleanup)
            return self._train(run)

    def _train(self, run: Run) -> Result:
        """Train, by the plain loop or on the ranks of the run's world, and make the result."""
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
        """Raise the `UserError`s that `fit` would, from the first batch and without training or measuring anything.

        Args:
            loader: as for `fit`.
        """
        check_loader(loader, 1)
        raise_problems(self.engine.function_problems())
        first, contracts = self._look(OneProcess(1), loader)
        self.engine.check_rows(first, batch_sizes(loader, None))
        if self.strategy == REFERENCE:
            return
        if self.costs is None:  # what blocks hold in memory is not known before they are measured
            plan = self.engine.plan(self.engine.assumed_costs(first.rows), first.rows)
        else:
            plan = self.engine.plan(self.costs, first.rows, memory_bytes=self.memory_bytes)
        self.engine.check_plan(plan, contracts)

    def measure(self, loader: Iterable[Any], *, world: World | None = None) -> Costs | BlockProfile:
        """Measure what `fit` would before it plans; called on all ranks together.

        Args:
            loader: as for `fit`; its first batch is read.
            world: as for `fit`.

        Returns:
            the costs of all blocks and of the links between ranks, to be given to trainers as `costs`.
        """
        world = self._world(world)
        first, contracts = self._look(world, loader)
        measured: Costs | BlockProfile = self.engine.measure(world, contracts, first)
        return measured

    def plan(self, loader: Iterable[Any], *, world: World | None = None) -> Any:
        """Make the plan that `fit` would follow; called on all ranks together.

        Args:
            loader: as for `fit`; its first batch is read.
            world: as for `fit`.

        Returns:
            a `Plan`, or a `BlockwisePlan` for blockwise training; None for "reference", which needs none.
        """
        if self.strategy == REFERENCE:
            return None
        world = self._world(world)
        first, contracts = self._look(world, loader)
        return self._plan(world, contracts, first)

    def _plan(self, world: World, contracts: Any, first: FirstBatch) -> Any:
        """Make the same plan on every rank, from the costs that were given, or that are measured here."""
        costs = world.broadcast(self.costs or self.engine.measure(world, contracts, first))
        plan = self.engine.plan(costs, first.rows, memory_bytes=self.memory_bytes)
        self.engine.check_plan(plan, contracts)
        return plan

    def _world(self, given: World | None) -> World:
        if self.strategy == REFERENCE:
            return OneProcess(1)
        return given or join_world(self.devices, self.device_type, self.timeout_seconds)

    def _reader(self, loader: Iterable[Any], epochs: int | None, steps: int | None, *, validates: bool = False) -> Reader:
        return Reader(
            loader, epochs=epochs, steps=steps, seed=self.seed, split_batch=self.split_batch if validates else self.engine.split,
            length_axis=self.length_axis, counts=None if validates else self.engine.counts, timeout_seconds=self.timeout_seconds,
        )  # fmt: skip

    def _look(self, world: World, loader: Iterable[Any]) -> tuple[FirstBatch, Any]:
        """Look at the first batch of a loader, and find out what crosses boundaries."""
        with ExitStack() as cleanup:
            first = self._first(world, DataOpener(cleanup, lambda: self._reader(loader, 1, 1)))
        return first, self.engine.contracts(first.sample)

    def _first(self, world: World, data: DataOpener) -> FirstBatch:
        """Look at the first batch on rank 0, and send what all ranks need to know of it."""
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
