"""Measures strategies of each kind of training: of students as a whole (with the plain loop and peers) and of single blocks."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice, repeat
from statistics import median
from typing import Any

import torch

from pipestill.compare.bench import Bench, Round
from pipestill.compare.figures import PlainLoop, calibrated, median_loop
from pipestill.compare.variants import PEERS
from pipestill.costs import Costs, Link
from pipestill.plan.blockwise.describe import describe
from pipestill.plan.blockwise.plan import BlockwisePlan
from pipestill.runtime.record import peak_bytes, reset_peak
from pipestill.runtime.world import device_of
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.schedule.simulate import simulate
from pipestill.train.engine import REFERENCE
from pipestill.train.pipeline import PipelineEngine
from pipestill.train.result import Result
from pipestill.train.trainer import Trainer


class PipelineBench(Bench):
    """Measures pipelines; a step without a schedule is the plain loop's."""

    plain_strategy = REFERENCE
    measuring_strategy = "fill"

    def run(self, name: str, costs: Costs) -> Round:
        return self._run_peer(name, costs) if name in PEERS else super().run(name, costs)

    def _run_peer(self, name: str, costs: Costs) -> Round:
        """Train by `torch.distributed.pipelining`, on the partition that our own 1F1B would take."""
        from pipestill.runtime.pipeline.torch_pipelining import train_with_torch

        self.world.barrier()
        trainer = self.variant(name, costs)
        device = device_of(self.world.ranks[0], trainer.device_type)
        torch.manual_seed(0)  # the same batches on every rank, read beforehand: ours are read ahead by a thread
        batches = list(islice(chain.from_iterable(repeat(self.batches)), self.steps))
        reset_peak(device)
        seconds = train_with_torch(
            trainer.task, trainer.engine.contracts(self.batches.first), trainer.engine.plan(costs, self.batches.rows), batches,
            kind=PEERS[name], optimizer=trainer.make_optimizer, seed=self.options.seed, device=device,
        )  # fmt: skip
        return Round(median(seconds[len(seconds) // 3 :]), self.world.gather([peak_bytes(device)]))

    def link(self, loop: PlainLoop, costs: Costs) -> Link:
        """The link for actions of the length that a step's have on average."""
        if self.world.num_ranks == 1:
            return Link()
        microbatches = self.options.microbatches
        rows = math.ceil(self.batches.rows / microbatches)
        engine = PipelineEngine(self.variant("sequential", costs))
        return engine.measure_link(self.world, self.batches.first, rows, loop.alone_seconds / microbatches)

    def calibrated(self, costs: Costs, loops: Sequence[PlainLoop], links: Sequence[Link]) -> Costs:
        """Costs that add up to the plain loop's step, with its interference and the links of all rounds."""
        views = self.workload.task().demands.teacher_views
        return calibrated(costs, loops, links, microbatches=self.options.microbatches, teacher_views=views)

    def plan_figures(self, result: Result, costs: Costs) -> dict[str, Any]:
        plan, stages = result.plan, costs.stages(result.plan.student_partition, result.plan.teacher_partition)
        prediction = simulate(plan.schedule, stages)
        return {
            "predicted_seconds_per_step": prediction.seconds_per_step,
            "limit_seconds_per_step": stages.limit_seconds_per_step(plan.microbatches, plan.demands.teacher_views),
            "predicted_utilisation": prediction.utilisation,
            "stash_peak": list(result.traces[-1].stash_peak),
            "staleness": result.staleness,
            "student_partition": list(plan.student_partition),
            "teacher_partition": list(plan.teacher_partition),
        }

    def calibration(self, costs: Costs) -> dict[str, Any]:
        return {"microbatches": self.options.microbatches, "interference": costs.interference}


_FEWEST_WINDOWS = 7


class BlockwiseBench(Bench):
    """Measures blockwise training; a step without a schedule is one pass of all work: each block's forward and step once."""

    plain_strategy = "relay-dpu"  # the plain loop runs the teacher anew for every block
    measuring_strategy = "relay-dpu"

    def steps_of(self, trainer: Trainer, costs: BlockProfile) -> int:
        """The number of batches to train: as many as asked for, or as many windows of them as show a steady state."""
        if trainer.strategy == REFERENCE:
            return self.steps
        plan: BlockwisePlan = trainer.engine.plan(costs, self.batches.rows, memory_bytes=trainer.memory_bytes)
        return max(self.steps, _FEWEST_WINDOWS * plan.window)

    def link(self, loop: PlainLoop, costs: BlockProfile) -> Link:
        """The link as it was measured with the blocks, before the first round."""
        return costs.link

    def calibrated(self, costs: BlockProfile, loops: Sequence[PlainLoop], links: Sequence[Link]) -> BlockProfile:
        """Scale the profile's work to what one pass takes while all processes compute."""
        rows = self.batches.rows
        one_pass = sum(block.teacher(rows) + block.student(rows) for block in costs.blocks)
        return costs.scaled(median_loop(loops).together_seconds / one_pass)

    def plan_figures(self, result: Result, costs: BlockProfile) -> dict[str, Any]:
        plan = replace(result.plan, costs=replace(result.plan.costs, profile=costs))
        return {
            "predicted_seconds_per_step": plan.seconds_per_batch,
            "limit_seconds_per_step": plan.limit_seconds_per_batch,
            "predicted_utilisation": plan.utilisation,
            "window": plan.window,
            "memory_bytes": list(plan.memory_bytes),
            "plan": describe(plan),
        }

    def calibration(self, costs: BlockProfile) -> dict[str, Any]:
        return {
            "blocks": len(costs.blocks),
            "allreduce_ranks": list(costs.blocks[0].allreduce_ranks),
            "allreduce_seconds": [list(block.allreduce_seconds) for block in costs.blocks],
        }
