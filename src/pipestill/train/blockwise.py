"""The trainer of blockwise distillation: every student block alone, over any number of devices."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any

import torch
from torch import nn

from pipestill.arguments import (
    check_extent,
    check_trainer,
    checked_factor,
    one_of,
    raise_problems,
    real_number,
    shown,
    try_first,
)
from pipestill.errors import ConfigError, PlanError, nearest
from pipestill.model.blockwise.contracts import BlockwiseContracts
from pipestill.model.blockwise.dry_run import blockwise_dry_run
from pipestill.model.blockwise.profile import measure_blocks
from pipestill.model.blockwise.task import Blockwise
from pipestill.optim import make_optimizer as optimizer_of
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES, BlockwisePlan, make_blockwise_plan
from pipestill.runtime.blockwise.all_reduce import measure_allreduces
from pipestill.runtime.blockwise.groups import process_groups
from pipestill.runtime.blockwise.rank import BlockwiseRank
from pipestill.runtime.blockwise.reference import blockwise_reference
from pipestill.runtime.memory import peak_bytes, reset_peak
from pipestill.runtime.pipeline.stage import move
from pipestill.runtime.settings import TrainingSettings
from pipestill.runtime.transport.links import measure_link
from pipestill.runtime.world import OneProcess, Processes, World, choose_device_type, device_of, join_world
from pipestill.schedule import Event, Op, Trace
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.train.callbacks import Callback
from pipestill.train.data import Reader, SplitBatch, check_loader, inputs_and_targets, sample
from pipestill.train.result import CPU, REFERENCE, Reporter, total_steps, versions


@dataclass(frozen=True)
class BlockResult:
    """What a blockwise run did. Complete on the process of rank 0 only; `plan` is None for `reference`.

    `seconds_per_batch` is of the steady state, over all phases: of training every block on one batch.
    """

    strategy: str
    devices: int
    backend: str
    batches: int
    samples: int
    seconds: float
    seconds_per_batch: float
    utilisation: float
    predicted_seconds_per_batch: float | None
    limit_seconds_per_batch: float | None
    peak_memory_bytes: list[int]
    losses: list[float]
    """Of each block, the mean of its last logged batches."""
    plan: BlockwisePlan | None = field(repr=False, default=None)
    traces: tuple[Trace, ...] = field(repr=False, default=())

    def summary(self) -> dict[str, Any]:
        """What summary.json holds of it."""
        values = {name: value for name, value in vars(self).items() if name not in ("plan", "traces")}
        exact = "rows of a batch are split over ranks" if self._splits_rows() else True
        return {**values, "samples_per_second": self.samples / self.seconds, "exact": exact, "versions": versions()}

    def _splits_rows(self) -> bool:
        return self.plan is not None and splits_rows(self.plan)


def splits_rows(plan: BlockwisePlan) -> bool:
    """Whether ranks share batches of a student block, so that sums of gradients are rounded in another order."""
    structures = [phase.schedule.structure for phase in plan.phases]
    return any(a.op is Op.REDUCE for s in structures for a in s.actions())


class BlockwiseTrainer:
    """Trains every student block of `task` alone on its teacher block, over `devices` ranks.

    `optimizer(parameters, lr=lr, **optimizer_options)` is made once for each block, from its own parameters (and those of
    its projectors and candidates); `param_groups` turns a block's `{name: parameter}` into groups for it.
    `lr_schedule(batch)` is a factor on every group's rate. `strategy`: one of `plan.blockwise.BLOCKWISE_STRATEGIES`, or
    `reference`, a plain loop that trains one block after the other. `profile` holds the blocks' times, measured here
    where it is not given; `memory_bytes` limits what a rank may hold.

    Alone, all ranks take turns in this process; under torchrun or `pipestill.launch`, each process is one rank. Either way
    `student` is the whole model with its own names, on every process, once `fit` returns.
    """

    def __init__(
        self,
        task: Blockwise,
        *,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        lr: float = 0.1,
        optimizer_options: Mapping[str, Any] | None = None,
        param_groups: Callable[[dict[str, nn.Parameter]], list[dict[str, Any]]] | None = None,
        lr_schedule: Callable[[int], float] | None = None,
        devices: int = 1,
        strategy: str = "balanced",
        profile: BlockProfile | None = None,
        memory_bytes: float | None = None,
        device: str | None = None,
        split_batch: SplitBatch = inputs_and_targets,
        seed: int = 0,
        log_every: int = 10,
        callbacks: Sequence[Callback] = (),
        timeout_seconds: float = 600.0,
    ) -> None:
        if not isinstance(task, Blockwise):
            raise ConfigError(f"the task is {shown(task)}; expected a Blockwise")
        check_trainer(
            counts={"devices": devices, "log_every": log_every}, optimizer=optimizer, lr=lr,
            lr_schedules={"lr_schedule": lr_schedule}, optimizer_options=optimizer_options, param_groups=param_groups,
            device=device, split_batch=split_batch, seed=seed, callbacks=callbacks, timeout_seconds=timeout_seconds,
            more=(
                *one_of("profile", profile, (BlockProfile, NoneType), "a BlockProfile, or None to measure it"),
                *(() if memory_bytes is None else real_number("memory_bytes", memory_bytes, above=0)),
            ),
        )  # fmt: skip
        names = (REFERENCE, *BLOCKWISE_STRATEGIES)
        if strategy not in names:
            raise ConfigError(
                f"no strategy '{strategy}' for blocks{nearest(strategy, names)}; there are {', '.join(names)}"
            )
        if strategy == REFERENCE and devices > 1:
            raise PlanError(f"strategy 'reference' runs on one device, not {devices}; choose another, or devices=1")
        if profile is not None and len(profile.blocks) != task.num_blocks:
            raise PlanError(f"the profile is of {len(profile.blocks)} blocks, the models have {task.num_blocks}")
        self.task, self.strategy, self.devices = task, strategy, devices
        self.optimizer, self.lr, self.optimizer_options = optimizer, lr, dict(optimizer_options or {})
        self.param_groups, self.lr_factor = param_groups, checked_factor("lr_schedule", lr_schedule)
        self.profile, self.memory_bytes = profile, memory_bytes
        self.device_type = choose_device_type(device, devices)
        self.split_batch, self.seed, self.log_every = split_batch, seed, log_every
        self.callbacks, self.timeout_seconds = callbacks, timeout_seconds

    @property
    def student(self) -> nn.Module:
        """The unsplit student."""
        return self.task.student

    def make_optimizer(self, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        return optimizer_of(
            self.optimizer, parameters, lr=self.lr, options=self.optimizer_options, param_groups=self.param_groups
        )

    def fit(
        self,
        loader: Iterable[Any],
        *,
        epochs: int | None = None,
        steps: int | None = None,
        description: str = "blocks",
        world: World | None = None,
    ) -> BlockResult:
        """Train every block for `epochs` passes over `loader`, or `steps` batches, whichever ends first (default: one epoch).

        A loader yields (inputs, targets), or inputs alone; targets are not read. Every process has the loader; under
        `dp` and `ls` it is read again for every block. `world`: the ranks, if others than those that this process is part
        of. Raises `UserError`s before the first step where they can be seen then.
        """
        if epochs is None and steps is None:
            epochs = 1
        check_extent(epochs, steps)
        alone = self.strategy == REFERENCE
        every_block_reads = alone or self.strategy in ("dp", "ls")
        check_loader(
            loader, (epochs if steps is None and epochs else 1) * (self.task.num_blocks if every_block_reads else 1)
        )
        raise_problems(try_first("lr_schedule", self.lr_factor))
        if alone:
            world = OneProcess(1)
        world = world or join_world(self.devices, self.device_type, self.timeout_seconds)
        callbacks = self.callbacks if world.is_main else ()
        with ExitStack() as readers:

            def opened() -> Reader:
                reader = Reader(
                    loader, epochs=epochs, steps=steps, seed=self.seed, split_batch=self.split_batch,
                    timeout_seconds=self.timeout_seconds,
                )  # fmt: skip
                return readers.enter_context(closing(reader))

            waiting = [opened()] if world.is_main else []  # for whoever reads first: some loaders can be read once only
            first = waiting[0].peek() if waiting else None

            def read() -> Reader:
                return waiting.pop() if waiting else opened()

            few = world.broadcast(sample(first)[0] if first else None)
            rows = world.broadcast(first.rows if first else None)
            contracts = blockwise_dry_run(self.task, few)
            batches = total_steps(loader, epochs, steps)
            plan = None
            if not alone:
                profile = self.profile or self.measure(world, contracts, first.inputs if first else None, rows)
                plan = self.plan_for(profile, rows)
            passes = self.task.num_blocks if alone or self.strategy == "dp" else 1
            with Reporter(callbacks) as reporter:
                for callback in callbacks:
                    callback.start(description, None if batches is None else batches * passes)
                if plan is None:
                    return self._run_alone(read, contracts, reporter)
                return self._run(world, plan, contracts, read, reporter)

    def plan_for(self, profile: BlockProfile, batch: int) -> BlockwisePlan:
        """The plan of the strategy for batches of `batch` rows."""
        return make_blockwise_plan(
            profile, strategy=self.strategy, devices=self.devices, batch=batch, memory_bytes=self.memory_bytes
        )

    def measure(self, world: World, contracts: BlockwiseContracts, inputs: Any, rows: int) -> BlockProfile:
        """Times of every block measured on rank 0 alone, for batches of `rows` rows, and between processes links and
        all-reduces; the same on every rank, all of which call this together. `inputs`: a batch's, on rank 0.
        """
        link = measure_link(world, 0.0, device_of(world.ranks[0], self.device_type))
        profile = None
        if world.is_main:
            profile = measure_blocks(
                self.task,
                contracts,
                inputs,
                batch=rows,
                devices=self.devices,
                optimizer=self.make_optimizer,
                link=link,
                device=device_of(0, self.device_type),
            )
        profile = world.broadcast(profile)
        if isinstance(world, Processes) and world.num_ranks > 1:
            profile = measure_allreduces(
                self.task, contracts, inputs, profile, world=world, optimizer=self.make_optimizer,
                device=device_of(world.rank, self.device_type),
            )  # fmt: skip
        return profile

    def _run(
        self,
        world: World,
        plan: BlockwisePlan,
        contracts: BlockwiseContracts,
        read: Callable[[], Reader],
        reporter: Reporter,
    ) -> BlockResult:
        task, every = self.task, range(self.task.num_blocks)
        for tensors in (task.teacher_blocks.tensors_of(every), *map(task.tensors_of, every)):
            world.copy_from([t.detach() for t in tensors.values()], 0)  # as DDP does
        name = world.broadcast(uuid.uuid4().hex if world.is_main else None)
        settings = self._settings()
        groups = process_groups([plan]) if isinstance(world, Processes) else None
        for rank in world.ranks:
            reset_peak(device_of(rank, self.device_type))
        runs = [
            BlockwiseRank(
                plan, rank, task, contracts, settings=settings, device=device_of(rank, self.device_type),
                world=world, groups=groups, read=read, listener=reporter if rank == 0 else None, run_name=name,
            )
            for rank in world.ranks
        ]  # fmt: skip
        world.barrier()
        start = time.perf_counter()
        world.drive([run.run() for run in runs])
        world.barrier()
        seconds = time.perf_counter() - start
        self._collect(world, runs)
        told = world.gather([(run.events, run.losses, run.batches, run.samples) for run in runs])
        peaks = world.gather([peak_bytes(run.worker.device) for run in runs])
        return self._result(world, plan, told, peaks, seconds)

    def _result(
        self, world: World, plan: BlockwisePlan, told: list[_Told], peaks: list[int], seconds: float
    ) -> BlockResult:
        """What all ranks told; empty elsewhere than on the process of rank 0."""
        by = {number: rank for rank, (events, *_) in enumerate(told) for number in events}
        done = [
            replace(p, ranks=(by.get(i, p.ranks[0]),)) if len(p.ranks) == 1 else p for i, p in enumerate(plan.phases)
        ]
        losses = {block: loss for _, mine, _, _ in told for block, loss in mine.items()}
        batches, samples = max(((batches, samples) for _, _, batches, samples in told), default=(0, 0))
        traces = [
            Trace(
                len(phase.ranks),
                tuple(
                    sorted((e for events, *_ in told for e in events.get(number, ())), key=lambda event: event.start)
                ),
                by_block=True,
                batches_per_step=phase.window,
            )
            for number, phase in enumerate(plan.phases)
        ]
        steps = [
            trace.median_seconds_per_step or seconds * phase.window / max(batches, 1) / len(plan.phases)
            for trace, phase in zip(traces, plan.phases, strict=True)
        ]
        per_batch = replace(plan, phases=tuple(done)).total(steps)  # tasks may have been taken over
        busy = sum(sum(t.busy_seconds_per_step()) / p.window for t, p in zip(traces, plan.phases, strict=True))
        return BlockResult(
            strategy=plan.strategy, devices=plan.num_devices, backend=world.backend(self.device_type),
            batches=batches, samples=samples, seconds=seconds, seconds_per_batch=per_batch,
            utilisation=min(1.0, busy / (per_batch * plan.num_devices)),
            predicted_seconds_per_batch=plan.seconds_per_batch, limit_seconds_per_batch=plan.limit_seconds_per_batch,
            peak_memory_bytes=peaks, losses=[losses.get(i, math.nan) for i in range(self.task.num_blocks)], plan=plan,
            traces=tuple(traces),
        )  # fmt: skip

    def _collect(self, world: World, runs: Sequence[BlockwiseRank]) -> None:
        """Put everything back on the CPU, and every block on every process as it is where it was trained last."""
        task = self.task
        gathered = world.gather([run.worker.trained for run in runs])
        trained = world.broadcast(gathered or None)
        for block in range(task.num_blocks):
            owner = max(range(len(trained)), key=lambda rank: trained[rank].get(block, 0))
            for run in runs:
                if run.rank == owner:
                    run.worker.publish(block)
            for tensor in task.tensors_of(block).values():
                tensor.data, tensor.grad = tensor.data.to(CPU), None
            mine = range(block, block + 1)
            forms = world.broadcast(task.student_blocks.forms_of(mine) if owner in world.ranks else None, owner)
            beside = [t for module in task.modules_of(block).values() for t in module.state_dict().values()]
            world.copy_from([*task.student_blocks.adopt(forms), *beside], owner)
        move(task.teacher_blocks, range(task.num_blocks), CPU)

    def _run_alone(self, read: Callable[[], Reader], contracts: BlockwiseContracts, reporter: Reporter) -> BlockResult:
        """Each block by a plain loop over all of the data, one after the other; no schedule at all."""
        device = device_of(0, self.device_type)
        reset_peak(device)
        start = time.perf_counter()
        trained = blockwise_reference(
            self.task, contracts, read, settings=self._settings(), device=device, listener=reporter
        )
        seconds = time.perf_counter() - start
        return BlockResult(
            strategy=REFERENCE, devices=1, backend=self.device_type, batches=trained.batches, samples=trained.samples,
            seconds=seconds, seconds_per_batch=seconds / max(trained.batches, 1), utilisation=1.0,
            predicted_seconds_per_batch=None, limit_seconds_per_batch=None, peak_memory_bytes=[peak_bytes(device)],
            losses=trained.losses,
        )  # fmt: skip

    def _settings(self) -> TrainingSettings:
        return TrainingSettings(
            seed=self.seed, log_every=self.log_every, lr=self.lr, lr_factor=self.lr_factor,
            optimizer=self.make_optimizer, timeout_seconds=self.timeout_seconds,
        )  # fmt: skip


_Told = tuple[dict[int, list[Event]], dict[int, float], int, int]
"""What a rank tells at the end: events of each phase, losses of blocks, batches and samples."""
