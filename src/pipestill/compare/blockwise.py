"""Measures strategies of blockwise training side by side in one run, beside what the machine itself can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import median

import torch

from pipestill.compare.figures import (
    Comparison,
    PlainLoop,
    around_rounds,
    ceiling_figures,
    machine_figures,
    median_loop,
    strategy_figures,
)
from pipestill.compare.real import barrier, rank_here, slowest
from pipestill.compare.rounds import in_rounds
from pipestill.errors import ConfigError, nearest
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES, make_blockwise_plan
from pipestill.plan.describe import describe
from pipestill.recipes.recipe import Recipe, Workload
from pipestill.recipes.run_options import RunOptions
from pipestill.runtime.launch import launch
from pipestill.runtime.world import OneProcess
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.train.engine import REFERENCE
from pipestill.train.result import Result

_FEWEST_WINDOWS = 7
ONE_PASS = "relay-dpu"  # on one rank: every block's teacher forward and student step once a batch


def compare_blockwise(
    recipe: Recipe, options: RunOptions, strategies: Sequence[str], *, rounds: int, steps: int, device_type: str
) -> Comparison:
    """Train `steps` batches with each strategy in turn, `rounds` times over, on `options.devices` processes.

    Times are of training every block on one batch. Every round also measures the machine's own ceiling: how long one
    pass of all the work takes in one process alone, and in as many independent processes at once as there are devices.
    `speedup` is over the first strategy, as the median of the rounds' own ratios; spreads are the least and the largest.
    Predictions are from the blocks' profile, scaled to what one pass takes while all processes compute. Raises
    `ConfigError` for an unknown strategy.
    """
    known = (REFERENCE, *BLOCKWISE_STRATEGIES)
    for name in strategies:
        if name not in known or (name == REFERENCE and options.devices > 1):
            raise ConfigError(
                f"no strategy '{name}' for blocks{nearest(name, known)}; there are {', '.join(known[1:])}"
            )
    arguments = (recipe, options, tuple(strategies), rounds, steps)
    if options.devices == 1:
        return _measure(*arguments)
    measured: Comparison = launch(
        _measure, arguments, options.devices, device_type=device_type, threads=options.threads or 1,
        timeout_seconds=options.timeout_seconds,
    )  # fmt: skip
    return measured


def _measure(recipe: Recipe, options: RunOptions, strategies: tuple[str, ...], rounds: int, steps: int) -> Comparison:
    """On every rank of the run; the result is complete on rank 0."""
    if options.devices == 1:
        torch.set_num_threads(options.threads or 1)
    workload = recipe.workload(options.seed)
    _one_pass(workload, options, steps)  # the first run pays for imports and for memory from the system
    loops = list[PlainLoop]()  # of before each round, and of after the last

    def look_at_machine() -> None:
        alone = _one_pass(workload, options, steps, only_rank_0=True)
        loops.append(PlainLoop(alone, _one_pass(workload, options, steps)))

    look_at_machine()
    measured = _train(workload, dataclasses.replace(options, strategy=ONE_PASS), 2, None)
    assert measured.plan is not None
    profile = measured.plan.costs.profile

    def run(name: str) -> Result:
        barrier()
        return _train(workload, dataclasses.replace(options, strategy=name), steps, profile)

    runs = in_rounds(strategies, rounds, run, look_at_machine)
    return _figures(options, runs, around_rounds(loops), profile, steps)


def _one_pass(workload: Workload, options: RunOptions, steps: int, only_rank_0: bool = False) -> float:
    """Seconds a batch of all work once: the slowest process's, in all of them at once or in rank 0's alone."""
    barrier()
    seconds = 0.0
    if not only_rank_0 or rank_here() == 0:
        one = dataclasses.replace(options, devices=1, strategy=ONE_PASS)
        trainer = workload.trainer(workload.task(), one)
        seconds = trainer.fit(workload.loader, steps=steps, world=OneProcess(1)).seconds_per_step
    return slowest(seconds)


def _train(workload: Workload, options: RunOptions, steps: int, profile: BlockProfile | None) -> Result:
    """For `steps` batches, or as many windows of them as show a steady state."""
    trainer = workload.trainer(workload.task(), options, costs=profile)
    if profile is not None and profile.batch is not None:
        plan = trainer.engine.plan(profile, profile.batch)
        steps = max(steps, _FEWEST_WINDOWS * max(phase.window for phase in plan.phases))
    return trainer.fit(workload.loader, steps=steps)


def _figures(
    options: RunOptions,
    runs: dict[str, list[Result]],
    loops: Sequence[PlainLoop],
    profile: BlockProfile,
    steps: int,
) -> Comparison:
    """`loops`: a pass of all work around each round."""
    seconds = {name: [r.seconds_per_step for r in rounds] for name, rounds in runs.items()}
    results, beside, traces = strategy_figures(seconds), ceiling_figures(seconds, loops, options.devices), {}
    for name, rounds in runs.items():
        results[name] |= {
            **beside[name],
            "peak_memory_bytes": rounds[-1].peak_memory_bytes,
            "utilisation": median(r.utilisation for r in rounds),
        }
        plan = rounds[-1].plan
        if plan is not None:
            batch = plan.costs.batch
            one_pass = sum(block.teacher(batch) + block.student(batch) for block in profile.blocks)
            now = profile.scaled(median_loop(loops).together_seconds / one_pass)
            expected = make_blockwise_plan(
                now, strategy=name, devices=options.devices, batch=batch, memory_bytes=options.memory
            )
            results[name] |= {
                "predicted_seconds_per_step": expected.seconds_per_batch,
                "limit_seconds_per_step": expected.limit_seconds_per_batch,
                "window": plan.window,
                "memory_bytes": list(plan.memory_bytes),
                "plan": describe(plan),
            }
            traces[name] = rounds[-1].traces[-1]
    calibration = {
        **machine_figures(loops, options.devices),
        "blocks": len(profile.blocks),
        "steps": steps,
        "link": profile.link.to_json(),
        "allreduce_ranks": list(profile.blocks[0].allreduce_ranks),
        "allreduce_seconds": [list(block.allreduce_seconds) for block in profile.blocks],
    }
    return Comparison({"calibration": calibration, "results": [*results.values()]}, traces)
