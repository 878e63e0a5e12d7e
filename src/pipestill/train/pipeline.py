"""The engine of models that are trained as a whole: a pipeline, or the plain loop."""

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate, pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.arguments import try_first
from pipestill.costs import BlockCosts, Costs, Link
from pipestill.errors import ConfigError, ModelError, PlanError
from pipestill.model.batchnorm import batch_norms, check_norms
from pipestill.model.blocks import BlockModel, ranges
from pipestill.model.buffers import check_buffers
from pipestill.model.dry_run import dry_run, try_validation
from pipestill.model.features import Beside, LinearMap
from pipestill.model.first_look import FirstLook, first_look
from pipestill.model.nests import num_bytes, rows_of, to_device
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.profile import profile, wake_seconds
from pipestill.model.tasks import Momentum, Task, check_views, teacher_trains
from pipestill.model.trials import NO_SINGLE_ROWS, try_optimizer, why_no_single_row
from pipestill.plan import Plan, make_plan
from pipestill.runtime.pipeline.features import place_losses, trained_beside
from pipestill.runtime.pipeline.rank import PipelineRank, PlainRun, RankZero
from pipestill.runtime.pipeline.reference import Reference
from pipestill.runtime.pipeline.stage import move, placed
from pipestill.runtime.pipeline.ties import tied_blocks
from pipestill.runtime.reports import MetricMeans
from pipestill.runtime.settings import PipelineSettings
from pipestill.runtime.transport.links import measure_link
from pipestill.runtime.transport.protocol import World
from pipestill.runtime.world import device_of
from pipestill.schedule import PIPELINE_STRATEGIES, Trace
from pipestill.schedule.pipeline.structure import Demands
from pipestill.train.engine import CPU, REFERENCE, Engine, FirstBatch, Run
from pipestill.train.options import TrainerOptions
from pipestill.train.result import Figures
from pipestill.train.state import State

_LEAST_ROWS = 8
"""Rows on which the first losses are looked at, or those of a microbatch where these are more."""


class PipelineEngine(Engine):
    """Trains the student of a distillation, a momentum or a supervised task over pipeline stages, or by the plain loop."""

    strategies = PIPELINE_STRATEGIES
    default_strategy = "fill"
    validates = True
    expected_costs = Costs, "Costs (Costs.load reads a file), or None to measure them"
    task: Task

    def __init__(self, options: TrainerOptions) -> None:
        super().__init__(options)
        task = self.task
        axis, staleness = options.length_axis, options.staleness
        if axis is not None and axis < 1:
            raise ConfigError(f"length_axis is {axis}; expected 1 or more, for axis 0 counts samples")
        if staleness not in (None, 0, 1):
            raise PlanError(f"staleness is {staleness}; expected 0 or 1")
        if options.student_staleness not in (0, 1):
            raise PlanError(f"student_staleness is {options.student_staleness}; expected 0 or 1")
        if options.student_staleness and self.strategy != REFERENCE:
            raise PlanError("student_staleness is of 'reference', to emulate 'async'; leave it out")
        if self.strategy == REFERENCE and staleness and not task.demands.momentum:
            raise PlanError("staleness is of a momentum teacher; a frozen one has no versions; leave it out")
        stale = self.strategy in ("tspipe", "async") or staleness
        if stale and isinstance(task, Momentum) and task.teacher_buffers == "copy":
            raise PlanError(
                "with a stale teacher, copies of the student's buffers would be of another step than its weights; "
                "use teacher_buffers='own', or 'fill' with staleness 0"
            )
        check_norms(options.batch_norm, self._models)

    @property
    def models(self) -> list[nn.Module]:
        return [model.model for model in self._models]

    @property
    def _models(self) -> list[BlockModel]:
        return [model for model in (self.task.student_blocks, self.task.teacher_blocks) if model is not None]

    @property
    def changed_modules(self) -> dict[str, nn.Module]:
        changed = {"student": self.task.student, **{name: module for name, module, _ in self.task.beside}}
        return {**changed, "teacher": self.task.teacher} if isinstance(self.task, Momentum) else changed

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        weights = {name: p for name, p in self.task.student.named_parameters() if p.requires_grad}
        return {**weights, **trained_beside(self.task, range(len(self.task.student_blocks)))}

    # -- before a run -------------------------------------------------------------------------------------------

    def split(self, item: Any) -> tuple[Any, Any]:
        """Split what the loader yields; `DataError` also where a view of the inputs is missing."""
        inputs, targets = super().split(item)
        check_views(self.task, inputs)
        return inputs, targets

    def function_problems(self) -> Iterator[str]:
        yield from super().function_problems()
        if isinstance(self.task, Momentum):
            yield from try_first("momentum", self.task.momentum_at)

    def counts(self, targets: Any) -> dict[str, float]:
        return self.task.loss_counts(targets)

    def contracts(self, sample: tuple[Any, Any]) -> PipelineContracts:
        contracts = dry_run(self.task, *sample, split=self.options.split_backward, length_axis=self.options.length_axis)
        try_optimizer(self.task.student_blocks, self.options.make_optimizer, device_of(0, self.options.device_type))
        return contracts

    def check_rows(self, first: FirstBatch, sizes: Collection[int]) -> None:
        """Refuse batch norm over microbatches of one row."""
        count = self.options.microbatches
        single = sorted(rows for rows in {first.rows, *sizes} if rows // count <= 1)
        if not single or self.options.batch_norm == "frozen":
            return
        where = why_no_single_row(self.task, rows_of(first.sample[0], slice(0, 1)))
        if where is not None:
            raise ModelError(
                f"a batch of {single[0]} rows in {count} microbatches has some of one row, and batch norm in {where} needs "
                f"more than one value of each channel; {NO_SINGLE_ROWS}"
            )

    def look(self, first: FirstBatch) -> FirstLook:
        """Evaluate both models on a microbatch or so, on the device of rank 0 where both fit on it."""
        if first.whole is None:
            return FirstLook()
        rows = slice(0, min(first.rows, max(_LEAST_ROWS, math.ceil(first.rows / self.options.microbatches))))
        given = rows_of(first.whole.inputs, rows), rows_of(first.whole.targets, rows)
        device = device_of(0, self.options.device_type)
        held = num_bytes([t for model in self.models for t in (*model.parameters(), *model.buffers())])
        if device.type == "cuda" and 2 * held > torch.cuda.mem_get_info(device)[0]:
            return FirstLook(("no look at the first losses: both models do not fit on one device",))
        try:
            with placed(self.task, device) if device.type == "cuda" else nullcontext():
                return first_look(self.task, *to_device(given, device))
        except Exception as error:  # what can be trained is trained, whatever becomes of a look at it
            return FirstLook((f"no look at the first losses: {type(error).__name__}: {error}",))

    def assumed_costs(self, rows: int) -> Costs:
        teacher = self.task.teacher_blocks
        return Costs(
            tuple(BlockCosts(block.name, 1.0, 1.0) for block in self.task.student_blocks.blocks),
            tuple(BlockCosts(block.name, 1.0) for block in teacher.blocks) if teacher else (),
            views=(1.0,) * self.task.demands.views,
        )

    def plan(self, costs: Costs, rows: int = 0, *, memory_bytes: float | None = None) -> Plan:
        """Make the plan. It does not depend on the rows of a batch: the costs are those of a microbatch."""
        num_blocks = (len(self.task.student_blocks), len(self.task.teacher_blocks or ()))
        if (len(costs.student), len(costs.teacher)) != num_blocks:
            raise PlanError(
                f"the costs are of {len(costs.student)} student and {len(costs.teacher)} teacher blocks, "
                f"the models have {num_blocks[0]} and {num_blocks[1]}; measure them anew"
            )
        options = self.options
        plan = make_plan(
            costs, devices=options.devices, strategy=self.strategy, microbatches=options.microbatches,
            student_partition=options.student_partition, teacher_partition=options.teacher_partition,
            run_ahead=options.run_ahead, staleness=options.staleness, split_backward=options.split_backward,
            stash=options.stash, demands=self.demands, memory_bytes=memory_bytes,
        )  # fmt: skip
        if self.task.demands.momentum:  # a moving average follows one copy of a weight
            self.task.student_blocks.check_ties(ranges(plan.student_partition))
        return plan

    def check_plan(self, plan: Plan, contracts: PipelineContracts) -> None:
        """Refuse stages that would see an old copy of a buffer that another stage writes."""
        models = (self.task.student_blocks, self.task.teacher_blocks)
        partitions = (plan.student_partition, plan.teacher_partition)
        for role, model, partition in zip(("student", "teacher"), models, partitions, strict=True):
            if model is not None:
                check_buffers(model, [one for one in contracts.shared_buffers if one.role == role], ranges(partition))

    def plain_options(self, plan: Plan) -> dict[str, Any]:
        structure = plan.schedule.structure
        return {
            "microbatches": structure.num_microbatches,
            "staleness": structure.staleness or None,
            "student_staleness": structure.student_staleness,
        }

    @property
    def demands(self) -> Demands:
        """The demands of the task and of the clipping on the schedule."""
        ties = () if self.task.demands.momentum else tuple(tied_blocks(self.task.student_blocks).values())
        return dataclasses.replace(self.task.demands, clip=self.options.clip_grad_norm is not None, ties=ties)

    def measure(self, world: World, contracts: PipelineContracts, first: FirstBatch) -> Costs:
        """Costs of every block for a microbatch, measured on rank 0 alone.

        On CPUs it is also measured how much longer a microbatch takes while all ranks compute.
        """
        few, rows = first.sample, math.ceil(first.rows / self.options.microbatches)
        device = device_of(world.ranks[0], self.options.device_type)

        def once() -> Costs:
            with placed(self.task, device):
                return profile(
                    self.task, contracts, *to_device(few, device), rows=rows, optimizer=self.options.make_optimizer,
                    split=self.options.split_backward,
                )  # fmt: skip

        alone = once() if world.is_main else None
        if len(world.ranks) == world.num_ranks:
            assert alone is not None
            return alone
        world.barrier()
        seen = self.task.demands.teacher_views
        if device.type != "cpu":  # no rank shares a device with another
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
        """Measure the links between ranks; called on all of them together.

        On CPUs a link depends on the length of the actions around it: `microbatch_seconds` gives their average.
        """
        device = device_of(world.ranks[0], self.options.device_type)
        if device.type != "cpu":
            return measure_link(world, 0.0, device)
        an_action = microbatch_seconds / (3 * self.options.devices * self.task.demands.views)
        link = measure_link(world, an_action, device)
        if world.is_main:
            slept = wake_seconds(self.task, *few, rows=rows, num_stages=self.options.devices, nap_seconds=an_action)
            link = dataclasses.replace(link, wake_seconds=link.wake_seconds + slept)
        return world.broadcast(link)

    # -- a run --------------------------------------------------------------------------------------------------

    def ranks(self, run: Run) -> list[PipelineRank]:
        self._check_validation(run)
        if self.run_state.first_step:
            raise PlanError(f"only 'reference' can go on from step {self.run_state.first_step} so far, not '{self.strategy}'")
        self.run_state.start()
        world, plan, main = run.world, run.plan, run.world.is_main
        for model in self._models:
            forms = world.broadcast(model.forms_of(range(len(model))) if main else None)
            world.copy_from(model.adopt(forms), 0)  # as DDP does: a script may have drawn other weights in each process
        for beside in self.task.beside:
            world.copy_from(_state_of(beside), 0)
        settings = self._settings(run)
        zero = RankZero(run.data(), run.validation, run.reporter) if main else None
        return [
            PipelineRank(
                plan, rank, self.task, run.contracts, settings=settings, device=device_of(rank, self.options.device_type),
                world=world, zero=zero if rank == 0 else None,
            )
            for rank in world.ranks
        ]  # fmt: skip

    def _check_validation(self, run: Run) -> None:
        """Evaluate the first microbatch of the validation data, which may be unlike the training data."""
        if run.validation is None:
            return
        batch = run.validation.peek()
        rows = math.ceil(batch.rows / self.options.microbatches)
        few = slice(0, rows)
        ends = set(accumulate(run.plan.student_partition)) if run.plan is not None else set[int]()
        try_validation(
            self.task, run.contracts.at(batch.length), rows_of(batch.inputs, few), rows_of(batch.targets, few), rows, ends,
            MetricMeans(self.options.metrics or {}).add,
        )  # fmt: skip

    def collect(self, run: Run, ranks: Sequence[PipelineRank], seconds: float) -> Figures:
        world, plan = run.world, run.plan
        for rank in ranks:
            rank.recorder.events()  # on CUDA: until all work is done
        for rank in ranks:  # not before all have ended: ranks in one process have one model
            rank.student.ties.end()
        for model in self._models:
            move(model, range(len(model)), CPU)
        moved = [(self.task.student_blocks, plan.student_partition)]
        if isinstance(self.task, Momentum):
            moved.append((self.task.teacher_blocks, plan.teacher_partition))
        for model, partition in moved:
            for owner, blocks in enumerate(ranges(partition)):
                forms = world.broadcast(model.forms_of(blocks) if owner in world.ranks else None, owner)
                world.copy_from(model.adopt(forms), owner)
        structure = plan.schedule.structure
        for beside in self.task.beside:
            stage = next(i for i, blocks in enumerate(ranges(plan.student_partition)) if beside.block in blocks)
            world.copy_from(_state_of(beside), structure.student_ranks[stage])
        events = world.gather([rank.recorder.events() for rank in ranks])
        trace = Trace(
            plan.num_devices,
            tuple(sorted((e for mine in events for e in mine), key=lambda event: event.start)),
            ranks[0].recorder.interruptions(),
        )
        steps, samples = run.data.counts()
        self.run_state.end(world.broadcast(steps if world.is_main else None))
        staleness = plan.proof.staleness
        return Figures(
            steps=steps, samples=samples, seconds=seconds,
            seconds_per_step=trace.median_seconds_per_step or seconds / max(steps, 1), utilisation=trace.utilisation,
            bubble=trace.bubble, predicted_seconds_per_step=plan.prediction.seconds_per_step,
            limit_seconds_per_step=plan.limit_seconds_per_step, staleness=staleness, exact=_exact(staleness),
            metrics=dict(run.reporter.metrics), beside=self._beside_tensors(), losses=_losses(run),
            whole_backwards=self._whole_backwards(run.contracts),
            traces=(trace,),
        )  # fmt: skip

    def plain(self, run: Run) -> Figures:
        self._check_validation(run)
        first_step = self.run_state.start(run.data)
        device = device_of(0, self.options.device_type)
        for model in self._models:
            move(model, range(len(model)), device)
        staleness = self.options.staleness or 0
        reference = Reference(
            self.task, run.contracts, self._settings(run), device, self.options.microbatches, staleness,
            self.options.student_staleness, first_step,
        )  # fmt: skip
        loop = PlainRun(reference, RankZero(run.data(), run.validation, run.reporter))
        loop.run()
        for model in self._models:
            move(model, range(len(model)), CPU)
        place_losses(self.task, range(len(self.task.student_blocks)), CPU)
        steps, samples = run.data.counts()
        self.run_state.end(steps)
        return Figures(
            steps=steps, samples=samples, seconds=loop.moments[-1] - loop.moments[0],
            seconds_per_step=median(b - a for a, b in pairwise(loop.moments)), staleness=staleness, exact=_exact(staleness),
            metrics=dict(run.reporter.metrics), beside=self._beside_tensors(), losses=_losses(run),
        )  # fmt: skip

    def _beside_tensors(self) -> dict[str, Tensor]:
        """Copies of the tensors of losses and projectors, by name."""
        named = ((f"{b.name}.{key}", tensor) for b in self.task.beside for key, tensor in b.module.state_dict().items())
        return {name: tensor.detach().clone() for name, tensor in named}

    def _settings(self, run: Run) -> PipelineSettings:
        options = self.options
        in_train_mode = self._models if teacher_trains(self.task) else [self.task.student_blocks]
        return PipelineSettings(
            seed=options.seed, log_every=options.log_every, schedules=self.schedules,
            optimizer=self.run_state.remembering(options.make_optimizer), timeout_seconds=options.timeout_seconds,
            metrics=options.metrics or {}, validate=run.validates, largest_norm=options.clip_grad_norm,
            norms=run.cleanup.enter_context(batch_norms(options.batch_norm, in_train_mode)),
        )  # fmt: skip

    def load_state(self, state: State) -> None:
        if state.step and (self.options.staleness or self.options.student_staleness):
            raise PlanError("a run with a staleness cannot go on from a state so far: the step before is not part of it")
        for name, module, _ in self.task.beside:
            weight = state.parameters.get(f"{name}.weight")
            if isinstance(module, LinearMap) and module.weight is None and weight is not None:
                module.make(weight.shape, weight.dtype)  # no batch has told its widths yet
        super().load_state(state)

    def _whole_backwards(self, contracts: PipelineContracts) -> tuple[str, ...]:
        """The blocks whose backward is not split, and why."""
        blocks = self.task.student_blocks.blocks
        return tuple(f"block {i} ('{blocks[i].name}'): {reason}" for i, reason in sorted(contracts.unsplit.items()))


def _exact(staleness: int) -> bool | str:
    return f"no: each step reads weights that are {staleness} step old" if staleness else True


def _losses(run: Run) -> dict[str, float]:
    """The parts of the last logged loss."""
    logged = run.reporter.logged
    return {name: logged.get(name, logged["loss"]) for name in run.contracts.all_parts} if logged else {}


def _state_of(beside: Beside) -> list[Tensor]:
    """The tensors of a loss or a projector, such as weights and running means; on the CPU."""
    return list(beside.module.to(CPU).state_dict(keep_vars=True).values())
