"""The engine of blockwise training: every student block is trained against its teacher block, on any number of devices."""

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from pipestill.costs import Link
from pipestill.errors import PlanError
from pipestill.model.blockwise.dry_run import blockwise_dry_run
from pipestill.model.blockwise.profile import measure_blocks
from pipestill.model.blockwise.task import Blockwise, BlockwiseContracts
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES, BlockwisePlan, Phase, make_blockwise_plan
from pipestill.runtime.blockwise.measure_all_reduce import measure_allreduces
from pipestill.runtime.blockwise.rank import BlockwiseRank, blockwise_reference, process_groups
from pipestill.runtime.pipeline.stage import move
from pipestill.runtime.settings import TrainingSettings
from pipestill.runtime.transport.links import measure_link
from pipestill.runtime.transport.protocol import World
from pipestill.runtime.world import Processes, device_of
from pipestill.schedule import Event, Op, Trace
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes
from pipestill.train.engine import CPU, REFERENCE, Engine, FirstBatch, Run
from pipestill.train.options import TrainerOptions
from pipestill.train.result import Figures


class BlockwiseEngine(Engine):
    """Trains every student block of a blockwise task against its teacher block, on the ranks that share the blocks."""

    strategies = BLOCKWISE_STRATEGIES
    default_strategy = "balanced"
    validates = False
    expected_costs = BlockProfile, "a BlockProfile, or None to measure it"
    lacks = (
        "weight_decay_schedule", "microbatches", "staleness", "student_staleness", "split_backward", "stash", "run_ahead",
        "clip_grad_norm", "batch_norm", "student_partition", "teacher_partition", "metrics", "length_axis",
    )  # fmt: skip
    task: Blockwise

    def __init__(self, options: TrainerOptions) -> None:
        super().__init__(options)
        task = self.task
        self.num_readings = task.num_blocks if self.strategy in (REFERENCE, "dp", "ls") else 1
        self.num_passes = task.num_blocks if self.strategy in (REFERENCE, "dp") else 1
        if isinstance(options.costs, BlockProfile) and len(options.costs.blocks) != task.num_blocks:
            raise PlanError(
                f"the costs are of {len(options.costs.blocks)} blocks, the models have {task.num_blocks}; measure them anew"
            )

    @property
    def models(self) -> list[nn.Module]:
        return [self.task.teacher, *self.changed_modules.values()]

    @property
    def changed_modules(self) -> dict[str, nn.Module]:
        """The student, and what is trained beside its blocks."""
        beside = [self.task.modules_of(block) for block in range(self.task.num_blocks)]
        return {"student": self.task.student, **{name: module for modules in beside for name, module in modules.items()}}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        named = [self.task.parameters_of(block) for block in range(self.task.num_blocks)]
        return {name: parameter for parameters in named for name, parameter in parameters.items()}

    # -- before a run -------------------------------------------------------------------------------------------

    def contracts(self, sample: tuple[Any, Any]) -> BlockwiseContracts:
        return blockwise_dry_run(self.task, sample[0])

    def assumed_costs(self, rows: int) -> BlockProfile:
        times = [BlockTimes(block.name, (rows,), (1.0,), (1.0,), 1, 1) for block in self.task.student_blocks.blocks]
        return BlockProfile(tuple(times), Link(), rows)

    def plan(self, costs: BlockProfile, rows: int, *, memory_bytes: float | None = None) -> BlockwisePlan:
        return make_blockwise_plan(
            costs, strategy=self.strategy, devices=self.options.devices, batch=rows, memory_bytes=memory_bytes
        )

    def splits_rows(self, plan: BlockwisePlan) -> bool:
        structures = [phase.schedule.structure for phase in plan.phases]
        return any(action.op is Op.REDUCE for structure in structures for action in structure.actions())

    def measure(self, world: World, contracts: BlockwiseContracts, first: FirstBatch) -> BlockProfile:
        """Measure every block on rank 0 alone, for shares of a batch, and the links and all-reduces between processes."""
        device = device_of(world.ranks[0], self.options.device_type)
        link = measure_link(world, 0.0, device)
        inputs = first.whole.inputs if first.whole is not None else None
        profile = None
        if world.is_main:
            profile = measure_blocks(
                self.task, contracts, inputs, batch=first.rows, devices=self.options.devices,
                optimizer=self.options.make_optimizer, link=link, device=device,
            )  # fmt: skip
        profile = world.broadcast(profile)
        if isinstance(world, Processes) and world.num_ranks > 1:
            profile = measure_allreduces(
                self.task, contracts, inputs, profile, world=world, optimizer=self.options.make_optimizer, device=device
            )
        return profile

    # -- a run --------------------------------------------------------------------------------------------------

    def ranks(self, run: Run) -> list[BlockwiseRank]:
        world, plan, task, options = run.world, run.plan, self.task, self.options
        every = range(task.num_blocks)
        for tensors in (task.teacher_blocks.tensors_of(every), *map(task.tensors_of, every)):
            world.copy_from([t.detach() for t in tensors.values()], 0)  # as DDP does
        name = world.broadcast(uuid.uuid4().hex if world.is_main else None)
        groups = process_groups([plan]) if isinstance(world, Processes) else None
        return [
            BlockwiseRank(
                plan, rank, task, run.contracts, settings=self._settings(), device=device_of(rank, options.device_type),
                world=world, groups=groups, read=run.data, listener=run.reporter if rank == 0 else None, run_name=name,
            )
            for rank in world.ranks
        ]  # fmt: skip

    def collect(self, run: Run, ranks: Sequence[BlockwiseRank], seconds: float) -> Figures:
        self._gather_blocks(run.world, ranks)
        reports = run.world.gather([_Report(rank.events, rank.losses, rank.batches, rank.samples) for rank in ranks])
        plan: BlockwisePlan = run.plan
        trained_by = {number: rank for rank, report in enumerate(reports) for number in report.events}
        done = [
            replace(phase, ranks=(trained_by.get(i, phase.ranks[0]),)) if len(phase.ranks) == 1 else phase
            for i, phase in enumerate(plan.phases)
        ]
        steps, samples = max(((report.batches, report.samples) for report in reports), default=(0, 0))
        traces = [_trace(phase, i, reports) for i, phase in enumerate(plan.phases)]
        spans = [
            trace.median_seconds_per_step or seconds * phase.window / max(steps, 1) / len(plan.phases)
            for trace, phase in zip(traces, plan.phases, strict=True)
        ]
        per_step = replace(plan, phases=tuple(done)).total(spans)  # a rank may have taken over the task of another
        utilisation = plan.utilisation_in(traces, per_step)
        losses = self._named({block: loss for report in reports for block, loss in report.losses.items()})
        return Figures(
            steps=steps, samples=samples, seconds=seconds, seconds_per_step=per_step, utilisation=utilisation,
            bubble=1.0 - utilisation, predicted_seconds_per_step=plan.seconds_per_batch,
            limit_seconds_per_step=plan.limit_seconds_per_batch,
            exact="rows of a batch are split over ranks" if self.splits_rows(plan) else True,
            losses=losses, metrics={"loss": math.fsum(losses.values())}, traces=tuple(traces),
        )  # fmt: skip

    def _gather_blocks(self, world: World, ranks: Sequence[BlockwiseRank]) -> None:
        """Copy every block to every process from the rank that trained it last, and put all models on the CPU."""
        task = self.task
        gathered = world.gather([rank.worker.trained for rank in ranks])
        trained = world.broadcast(gathered or None)
        for block in range(task.num_blocks):
            owner = max(range(len(trained)), key=lambda rank: trained[rank].get(block, 0))
            for rank in ranks:
                if rank.rank == owner:
                    rank.worker.publish(block)
            for tensor in task.tensors_of(block).values():
                tensor.data = tensor.data.to(CPU)
                tensor.grad = None
            mine = range(block, block + 1)
            forms = world.broadcast(task.student_blocks.forms_of(mine) if owner in world.ranks else None, owner)
            beside = [t for module in task.modules_of(block).values() for t in module.state_dict().values()]
            world.copy_from([*task.student_blocks.adopt(forms), *beside], owner)
        move(task.teacher_blocks, range(task.num_blocks), CPU)

    def plain(self, run: Run) -> Figures:
        """Train one block after the other by a plain loop, each over all of the data."""
        start = time.perf_counter()
        trained = blockwise_reference(
            self.task, run.contracts, run.data, settings=self._settings(), listener=run.reporter,
            device=device_of(0, self.options.device_type),
        )  # fmt: skip
        seconds = time.perf_counter() - start
        losses = self._named(dict(enumerate(trained.losses)))
        return Figures(
            steps=trained.batches, samples=trained.samples, seconds=seconds,
            seconds_per_step=seconds / max(trained.batches, 1), losses=losses,
            metrics={"loss": math.fsum(losses.values())},
        )  # fmt: skip

    def _settings(self) -> TrainingSettings:
        options = self.options
        return TrainingSettings(
            seed=options.seed, log_every=options.log_every, schedules=self.schedules,
            optimizer=options.make_optimizer, timeout_seconds=options.timeout_seconds,
        )  # fmt: skip

    def _named(self, losses: dict[int, float]) -> dict[str, float]:
        """The last logged loss of every block by its name; NaN for one that was not logged here."""
        return {block.name: losses.get(i, math.nan) for i, block in enumerate(self.task.student_blocks.blocks)}


class _Report(NamedTuple):
    """What one rank knows of a run that is over."""

    events: dict[int, list[Event]]
    """By the number of the phase."""
    losses: dict[int, float]
    """The last logged loss of each block whose phase this rank reported."""
    batches: int
    samples: int


def _trace(phase: Phase, number: int, reports: Sequence[_Report]) -> Trace:
    """The trace of one phase, from the events of all its ranks."""
    mine = sorted((event for report in reports for event in report.events.get(number, ())), key=lambda event: event.start)
    return Trace(len(phase.ranks), tuple(mine), by_block=True, batches_per_step=phase.window)
