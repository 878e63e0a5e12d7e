"""Measures strategies that train a student block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipestill.compare.bench import Bench
from pipestill.compare.figures import PlainLoop, median_loop
from pipestill.costs import Link
from pipestill.plan.blockwise.describe import describe
from pipestill.plan.blockwise.plan import BlockwisePlan
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.train.engine import REFERENCE
from pipestill.train.result import Result
from pipestill.train.trainer import Trainer

_FEWEST_WINDOWS = 7


class BlockwiseBench(Bench):
    """Measures blockwise training; a step without a schedule is one pass of all work: each block's forward and step once."""

    plain_strategy = "relay-dpu"  # the plain loop runs the teacher anew for every block
    measuring_strategy = "relay-dpu"

    def steps_of(self, trainer: Trainer, costs: BlockProfile) -> int:
        """As many batches as asked for, or as many windows of them as show a steady state."""
        if trainer.strategy == REFERENCE:
            return self.steps
        plan: BlockwisePlan = trainer.engine.plan(costs, self.batches.rows, memory_bytes=trainer.memory_bytes)
        return max(self.steps, _FEWEST_WINDOWS * plan.window)

    def link(self, loop: PlainLoop, costs: BlockProfile) -> Link:
        """The link as it was measured with the blocks, before the first round."""
        return costs.link

    def calibrated(self, costs: BlockProfile, loops: Sequence[PlainLoop], links: Sequence[Link]) -> BlockProfile:
        """Work scaled to what one pass takes while all processes compute."""
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
