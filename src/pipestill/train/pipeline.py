"""The trainer: from models and a loader to a trained student, on any number of devices."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import accumulate, pairwise
from statistics import median
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.arguments import (
    check_extent,
    check_trainer,
    checked_factor,
    metric_problems,
    one_of,
    raise_problems,
    real_number,
    shown,
    try_first,
    whole,
)
from pipestill.costs import BlockCosts, Costs, Link
from pipestill.errors import ConfigError, PlanError, nearest
from pipestill.losses import Metric
from pipestill.model.batchnorm import Norms, batch_norms, check_norms
from pipestill.model.blocks import BlockModel, ranges
from pipestill.model.dry_run import dry_run, try_validation
from pipestill.model.nests import rows_of, to_device
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.profile import profile, wake_seconds
from pipestill.model.tasks import Distillation, Momentum, Supervised, Task, check_views, teacher_trains
from pipestill.optim import make_optimizer as optimizer_of
from pipestill.plan import Plan, make_plan
from pipestill.runtime.batch import Batch
from pipestill.runtime.memory import peak_bytes, reset_peak
from pipestill.runtime.metrics import MetricMeans
from pipestill.runtime.pipeline.plain_run import PlainRun
from pipestill.runtime.pipeline.rank import PipelineRank, RankZero
from pipestill.runtime.pipeline.stage import move, placed
from pipestill.runtime.settings import PipelineSettings
from pipestill.runtime.transport.links import measure_link
from pipestill.runtime.world import OneProcess, World, choose_device_type, device_of, join_world
from pipestill.schedule import PIPELINE_STRATEGIES, Event, Trace
from pipestill.schedule.pipeline.structure import Demands
from pipestill.train.callbacks import Callback
from pipestill.train.data import Again, Reader, SplitBatch, check_loader, inputs_and_targets, sample, split_item
from pipestill.train.result import CPU, REFERENCE, Counted, Reporter, Result, total_steps


class Trainer:
    """Trains the student of `task` over `devices` pipeline stages, exactly as a plain loop would.

    `optimizer(parameters, lr=lr, **optimizer_options)` is made once per stage, from its own parameters; `param_groups`
    may turn its named parameters into groups first. `lr_schedule(step)` and `weight_decay_schedule(step)` are factors on
    every group's rate and decay. A batch is cut into `microbatches`, whose gradients add up to the batch's mean. With a
    `length_axis`, batches may differ in the size of that axis, which all their tensors that have it share (token sequences,
    say). `strategy` is a schedule's name or `reference`, a plain loop on one device. Partitions (blocks of each stage) are
    levelled from measured costs unless given.

    Alone, all ranks take turns in this process; under torchrun or `pipestill.launch`, each process is one rank. Either way
    `student` is the whole model with its own names, on every process, once `fit` returns.
    """

    def __init__(
        self,
        task: Task,
        *,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        lr: float = 0.1,
        optimizer_options: Mapping[str, Any] | None = None,
        param_groups: Callable[[dict[str, nn.Parameter]], list[dict[str, Any]]] | None = None,
        lr_schedule: Callable[[int], float] | None = None,
        weight_decay_schedule: Callable[[int], float] | None = None,
        devices: int = 1,
        strategy: str = "fill",
        microbatches: int = 8,
        staleness: int | None = None,
        split_backward: bool = False,
        stash: int | str | None = None,
        run_ahead: int | None = None,
        clip_grad_norm: float | None = None,
        batch_norm: str = "microbatch",
        student_partition: Sequence[int] | None = None,
        teacher_partition: Sequence[int] | None = None,
        costs: Costs | None = None,
        device: str | None = None,
        metrics: Mapping[str, Metric] | None = None,
        split_batch: SplitBatch = inputs_and_targets,
        length_axis: int | None = None,
        seed: int = 0,
        log_every: int = 10,
        callbacks: Sequence[Callback] = (),
        timeout_seconds: float = 600.0,
    ) -> None:
        if not isinstance(task, (Distillation, Momentum, Supervised)):
            raise ConfigError(f"the task is {shown(task)}; expected a Distillation, a Momentum or a Supervised")
        partition, sizes = (Sequence, NoneType), "blocks of each stage, such as [3, 3]"
        check_trainer(
            counts={"devices": devices, "microbatches": microbatches, "log_every": log_every}, optimizer=optimizer, lr=lr,
            lr_schedules={"lr_schedule": lr_schedule, "weight_decay_schedule": weight_decay_schedule},
            optimizer_options=optimizer_options, param_groups=param_groups, device=device, split_batch=split_batch, seed=seed,
            callbacks=callbacks, timeout_seconds=timeout_seconds,
            more=(
                *(() if length_axis is None else whole("length_axis", length_axis)),
                *(() if clip_grad_norm in (None, math.inf) else real_number("clip_grad_norm", clip_grad_norm)),
                *(() if staleness is None else whole("staleness", staleness)),
                *one_of("split_backward", split_backward, bool, "True or False"),
                *(() if stash is None or isinstance(stash, str) else whole("stash", stash)),
                *one_of("student_partition", student_partition, partition, sizes),
                *one_of("teacher_partition", teacher_partition, partition, sizes),
                *one_of("costs", costs, (Costs, NoneType), "Costs (Costs.load reads a file), or None to measure them"),
                *metric_problems(metrics),
            ),
        )  # fmt: skip
        names = (REFERENCE, *PIPELINE_STRATEGIES)
        if strategy not in names:
            raise ConfigError(f"no strategy '{strategy}'{nearest(strategy, names)}; there are {', '.join(names)}")
        if strategy == REFERENCE and devices > 1:
            raise PlanError(f"strategy 'reference' runs on one device, not {devices}; choose another, or devices=1")
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise ConfigError(f"clip_grad_norm is {clip_grad_norm}; expected more than 0, or none")
        if length_axis is not None and length_axis < 1:
            raise ConfigError(f"length_axis is {length_axis}; expected 1 or more, for axis 0 counts samples")
        if staleness not in (None, 0, 1):
            raise PlanError(f"staleness is {staleness}; expected 0 or 1")
        if strategy == REFERENCE and staleness and not task.demands.momentum:
            raise PlanError("staleness is of a momentum teacher; a frozen one has no versions; leave it out")
        stale = strategy in ("tspipe", "async") or staleness
        if stale and isinstance(task, Momentum) and task.teacher_buffers == "copy":
            raise PlanError(
                "with a stale teacher, copies of the student's buffers would be of another step than its weights; "
                "use teacher_buffers='own', or 'fill' with staleness 0"
            )
        check_norms(batch_norm, [m for m in (task.student_blocks, task.teacher_blocks) if m is not None])
        self.task, self.batch_norm = task, batch_norm
        self.staleness, self.split_backward, self.stash = staleness, split_backward, stash
        self.clip_grad_norm = clip_grad_norm
        self.student_staleness = 0  # of `reference`, to emulate the asynchronous strategy
        self.spare_ranks = False  # more processes than devices may have been started; the first ones call `fit`
        self.optimizer, self.lr, self.optimizer_options = optimizer, lr, dict(optimizer_options or {})
        self.param_groups, self.length_axis = param_groups, length_axis
        self.lr_factor = checked_factor("lr_schedule", lr_schedule)
        self.decay_factor = checked_factor("weight_decay_schedule", weight_decay_schedule)
        self.devices, self.strategy, self.microbatches, self.run_ahead = devices, strategy, microbatches, run_ahead
        self.student_partition, self.teacher_partition, self.costs = student_partition, teacher_partition, costs
        self.device_type = choose_device_type(device, devices)
        self.metrics, self.split_batch = dict(metrics or {}), split_batch
        self.seed, self.log_every, self.callbacks, self.timeout_seconds = seed, log_every, callbacks, timeout_seconds

    @property
    def student(self) -> nn.Module:
        """The unsplit student."""
        return self.task.student

    def fit(
        self,
        loader: Iterable[Any],
        *,
        epochs: int | None = None,
        steps: int | None = None,
        validate: Iterable[Any] | None = None,
        description: str = "train",
    ) -> Result:
        """Train for `epochs` passes over `loader`, or `steps` updates, whichever ends first (default: one epoch).

        A loader yields (inputs, targets), or inputs alone, as nests of tensors whose first axis counts samples.
        `validate` is read after every epoch. Raises `UserError`s before the first step where they can be seen then.
        """
        if epochs is None and steps is None:
            epochs = 1
        check_extent(epochs, steps)
        passes = epochs if steps is None else None
        check_loader(loader, passes)
        if validate is not None:
            check_loader(validate, passes, "the validation loader")
        self._try_functions()
        world = (
            OneProcess(1)
            if self.strategy == REFERENCE
            else join_world(self.devices, self.device_type, self.timeout_seconds, spare_ranks=self.spare_ranks)
        )
        with ExitStack() as readers, Reporter(self.callbacks if world.is_main else ()) as reporter:
            source = None
            if world.is_main:
                source = readers.enter_context(closing(self._reader(loader, epochs, steps, self._split)))
            few = world.broadcast(sample(source.peek()) if source else None)
            rows = world.broadcast(source.peek().rows if source else None)
            contracts = self.dry_run(*few)
            plan = None if self.strategy == REFERENCE else self._plan(world, contracts, few, rows)
            total = total_steps(loader, epochs, steps)
            for callback in reporter.callbacks:
                callback.start(description, total)
            validation = None
            if validate is not None and world.is_main:
                validation = Again(readers, lambda: self._reader(validate, 1, None, self.split_batch))
                self._try_validation(validation.peek(), contracts, plan)
            counted = Counted(source) if source else None
            with batch_norms(self.batch_norm, self._training_models()) as norms:
                if plan is None:
                    assert counted is not None
                    return self._run_reference(counted, contracts, validation, reporter, norms)
                return self._run(world, plan, contracts, counted, validation, reporter, norms, validate is not None)

    def preflight(self, loader: Iterable[Any]) -> None:
        """Raise the `UserError`s that `fit` would, from the first batch and without training or measuring anything."""
        check_loader(loader, 1)
        self._try_functions()
        with closing(self._reader(loader, 1, 1, self._split)) as reader:
            self.dry_run(*sample(reader.peek()))
        teacher = self.task.teacher_blocks
        costs = self.costs or Costs(
            tuple(BlockCosts(b.name, 1.0, 1.0) for b in self.task.student_blocks.blocks),
            tuple(BlockCosts(b.name, 1.0) for b in teacher.blocks) if teacher else (),
            views=(1.0,) * self.task.demands.views,
        )
        if self.strategy != REFERENCE:
            self.plan_for(costs)

    def dry_run(self, inputs: Any, targets: Any) -> PipelineContracts:
        """What crosses each boundary, from a sample of a batch; raises `UserError`s for what cannot work."""
        return dry_run(self.task, inputs, targets, split=self.split_backward, length_axis=self.length_axis)

    @property
    def demands(self) -> Demands:
        """What the task and the clipping ask of the schedule."""
        return dataclasses.replace(self.task.demands, clip=self.clip_grad_norm is not None)

    def _models(self) -> list[BlockModel]:
        return [model for model in (self.task.student_blocks, self.task.teacher_blocks) if model is not None]

    def _split(self, item: Any) -> tuple[Any, Any]:
        """What the loader yields as inputs, whose views are all there, and targets."""
        inputs, targets = split_item(self.split_batch, item, "what the loader gave")
        check_views(self.task, inputs)
        return inputs, targets

    def _training_models(self) -> list[BlockModel]:
        models = [self.task.student_blocks]
        if self.task.teacher_blocks is not None and teacher_trains(self.task):
            models.append(self.task.teacher_blocks)
        return models

    def _reader(self, loader: Iterable[Any], epochs: int | None, steps: int | None, split_batch: SplitBatch) -> Reader:
        return Reader(
            loader, epochs=epochs, steps=steps, seed=self.seed, split_batch=split_batch, length_axis=self.length_axis,
            timeout_seconds=self.timeout_seconds,
        )  # fmt: skip

    def make_optimizer(self, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        return optimizer_of(
            self.optimizer, parameters, lr=self.lr, options=self.optimizer_options, param_groups=self.param_groups
        )

    def _try_functions(self) -> None:
        """Call the functions of the step once, before anything is trained by them."""
        raise_problems(
            [
                *try_first("lr_schedule", self.lr_factor),
                *try_first("weight_decay_schedule", self.decay_factor),
                *(try_first("momentum", self.task.momentum_at) if isinstance(self.task, Momentum) else ()),
            ]
        )

    def _try_validation(self, batch: Batch, contracts: PipelineContracts, plan: Plan | None) -> None:
        """Evaluate the first microbatch of the validation data, which may be unlike the training data."""
        rows = math.ceil(batch.rows / self.microbatches)
        few = slice(0, rows)
        ends = set(accumulate(plan.student_partition)) if plan is not None else set[int]()
        try_validation(
            self.task, contracts.at(batch.length), rows_of(batch.inputs, few), rows_of(batch.targets, few), rows, ends,
            MetricMeans(self.metrics).add,
        )  # fmt: skip

    def _plan(self, world: World, contracts: PipelineContracts, few: tuple[Any, Any], rows: int) -> Plan:
        """The same plan on every rank, from costs that rank 0 measured."""
        costs = self.costs or self.measure(world, contracts, few, math.ceil(rows / self.microbatches))
        return self.plan_for(world.broadcast(costs))

    def plan_for(self, costs: Costs) -> Plan:
        num_blocks = (len(self.task.student_blocks), len(self.task.teacher_blocks or ()))
        if (len(costs.student), len(costs.teacher)) != num_blocks:
            raise PlanError(
                f"the costs are of {len(costs.student)} student and {len(costs.teacher)} teacher blocks, "
                f"the models have {num_blocks[0]} and {num_blocks[1]}; measure them anew"
            )
        plan = make_plan(
            costs, devices=self.devices, strategy=self.strategy, microbatches=self.microbatches,
            student_partition=self.student_partition, teacher_partition=self.teacher_partition, run_ahead=self.run_ahead,
            staleness=self.staleness, split_backward=self.split_backward, stash=self.stash, demands=self.demands,
        )  # fmt: skip
        self.task.student_blocks.check_ties(ranges(plan.student_partition))
        return plan

    def measure(self, world: World, contracts: PipelineContracts, few: tuple[Any, Any], rows: int) -> Costs:
        """Costs of every block for `rows` rows measured on rank 0 alone, and on CPUs how much longer it takes while all ranks
        compute. On all ranks together.
        """
        device = device_of(world.ranks[0], self.device_type)

        def once() -> Costs:
            with placed(self.task, device):
                return profile(
                    self.task, contracts, *to_device(few, device), rows=rows, optimizer=self.make_optimizer,
                    split=self.split_backward,
                )  # fmt: skip

        alone = once() if world.is_main else None
        if len(world.ranks) == world.num_ranks:
            assert alone is not None
            return alone
        world.barrier()
        seen = self.task.demands.teacher_views
        if device.type != "cpu":  # nobody shares a device
            link = self.measure_link(world, few, rows, 0.0)
            return world.broadcast(alone and alone.with_surroundings(link, 1.0))
        together = once()
        link = self.measure_link(world, few, rows, together.microbatch_seconds(seen))
        slowest = world.gather([together.microbatch_seconds(seen)])
        interference = 1.0
        if alone is not None:
            interference = max(1.0, sum(slowest) / len(slowest) / alone.microbatch_seconds(seen))
        return world.broadcast(alone and alone.with_surroundings(link, interference))

    def measure_link(self, world: World, few: tuple[Any, Any], rows: int, microbatch_seconds: float) -> Link:
        """The links between ranks; on CPUs for actions of the length that those of such a microbatch have on average. On all
        ranks together.
        """
        device = device_of(world.ranks[0], self.device_type)
        if device.type != "cpu":
            return measure_link(world, 0.0, device)
        an_action = microbatch_seconds / (3 * self.devices * self.task.demands.views)
        link = measure_link(world, an_action, device)
        if world.is_main:
            slept = wake_seconds(self.task, *few, rows=rows, num_stages=self.devices, nap_seconds=an_action)
            link = dataclasses.replace(link, wake_seconds=link.wake_seconds + slept)
        return world.broadcast(link)

    def _run(
        self,
        world: World,
        plan: Plan,
        contracts: PipelineContracts,
        source: Counted | None,
        validation: Callable[[], Iterator[Batch]] | None,
        reporter: Reporter,
        norms: Norms,
        validate: bool,
    ) -> Result:
        for rank in world.ranks:
            reset_peak(device_of(rank, self.device_type))
        for model in self._models():
            forms = world.broadcast(model.forms_of(range(len(model))) if world.is_main else None)
            world.copy_from(model.adopt(forms), 0)  # as DDP does: a script may have drawn other weights in each process
        world.copy_from(self._loss_state(), 0)
        settings = self._settings(validate, norms)
        zero = None if source is None else RankZero(source, validation, reporter)
        runs = [
            PipelineRank(
                plan, rank, self.task, contracts, settings=settings, device=device_of(rank, self.device_type),
                world=world, zero=zero if rank == 0 else None,
            )
            for rank in world.ranks
        ]  # fmt: skip
        world.barrier()
        start = time.perf_counter()
        world.drive([run.run() for run in runs])
        world.barrier()
        seconds = time.perf_counter() - start
        self._collect(world, plan, runs)
        events = world.gather([run.recorder.events() for run in runs])
        peaks = world.gather([peak_bytes(run.recorder.device) for run in runs])
        interruptions = runs[0].recorder.interruptions()
        trace = Trace(plan.num_devices, tuple(sorted((e for rank in events for e in rank), key=_start)), interruptions)
        steps, samples = (source.steps, source.samples) if source else (0, 0)
        return Result(
            strategy=plan.strategy, devices=plan.num_devices, backend=world.backend(self.device_type),
            steps=steps, samples=samples, seconds=seconds,
            seconds_per_step=trace.median_seconds_per_step or seconds / max(steps, 1),
            utilisation=trace.utilisation, bubble=trace.bubble,
            predicted_seconds_per_step=plan.prediction.seconds_per_step,
            limit_seconds_per_step=plan.limit_seconds_per_step, staleness=plan.proof.staleness, peak_memory_bytes=peaks,
            metrics=dict(reporter.metrics), whole_backwards=_whole(self.task, contracts), plan=plan, trace=trace,
        )  # fmt: skip

    def _collect(self, world: World, plan: Plan, runs: Sequence[PipelineRank]) -> None:
        """Put both models back on the CPU, and every stage's trained weights on every process."""
        for run in runs:
            run.recorder.events()  # on CUDA: until all work is done
        for model in self._models():
            move(model, range(len(model)), CPU)
        moved = [(self.task.student_blocks, plan.student_partition)]
        if isinstance(self.task, Momentum):
            moved.append((self.task.teacher_blocks, plan.teacher_partition))
        for model, partition in moved:
            for rank, blocks in enumerate(ranges(partition)):
                forms = world.broadcast(model.forms_of(blocks) if rank in world.ranks else None, rank)
                world.copy_from(model.adopt(forms), rank)
        structure = plan.schedule.structure
        world.copy_from(self._loss_state(), structure.student_ranks[structure.last])

    def _loss_state(self) -> list[Tensor]:
        """What a loss that is a module holds, such as running means; on the CPU."""
        loss = self.task.loss
        return list(loss.to(CPU).state_dict(keep_vars=True).values()) if isinstance(loss, nn.Module) else []

    def _run_reference(
        self,
        source: Counted,
        contracts: PipelineContracts,
        validation: Callable[[], Iterator[Batch]] | None,
        reporter: Reporter,
        norms: Norms,
    ) -> Result:
        """Training without a schedule, with the same logs."""
        device = device_of(0, self.device_type)
        reset_peak(device)
        for model in self._models():
            move(model, range(len(model)), device)
        run = PlainRun(
            self.task, contracts, settings=self._settings(validation is not None, norms), device=device,
            zero=RankZero(source, validation, reporter), microbatches=self.microbatches, staleness=self.staleness or 0,
            student_staleness=self.student_staleness,
        )  # fmt: skip
        run.run()
        for model in self._models():
            move(model, range(len(model)), CPU)
        self._loss_state()  # back on the CPU, like the models
        return Result(
            strategy=REFERENCE, devices=1, backend=self.device_type, steps=source.steps, samples=source.samples,
            seconds=run.moments[-1] - run.moments[0],
            seconds_per_step=median(b - a for a, b in pairwise(run.moments)),
            utilisation=1.0, bubble=0.0, predicted_seconds_per_step=None, limit_seconds_per_step=None,
            staleness=self.staleness or 0, peak_memory_bytes=[peak_bytes(device)], metrics=dict(reporter.metrics),
        )  # fmt: skip

    def _settings(self, validate: bool, norms: Norms) -> PipelineSettings:
        return PipelineSettings(
            seed=self.seed, log_every=self.log_every, lr=self.lr, lr_factor=self.lr_factor,
            optimizer=self.make_optimizer, timeout_seconds=self.timeout_seconds, decay_factor=self.decay_factor,
            metrics=self.metrics, validate=validate, norms=norms, largest_norm=self.clip_grad_norm,
        )  # fmt: skip


def _whole(task: Task, contracts: PipelineContracts) -> tuple[str, ...]:
    blocks = task.student_blocks.blocks
    return tuple(f"block {i} ('{blocks[i].name}'): {reason}" for i, reason in sorted(contracts.unsplit.items()))


def _start(event: Event) -> float:
    return event.start
