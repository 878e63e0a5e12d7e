"""Compares strategies on real devices, beside what the machine itself can do."""

from collections.abc import Sequence
from typing import Any

import torch

from pipestill.compare.bench import Bench
from pipestill.compare.benches import BlockwiseBench, PipelineBench
from pipestill.compare.figures import (
    Comparison,
    PlainLoop,
    around_rounds,
    ceiling_figures,
    in_rounds,
    machine_figures,
    strategy_figures,
)
from pipestill.compare.variants import PEERS, options_of
from pipestill.costs import Link
from pipestill.errors import ConfigError
from pipestill.recipes.recipe import Recipe, Workload
from pipestill.recipes.run_options import RunOptions
from pipestill.runtime.launch import launch
from pipestill.runtime.world import choose_device_type, join_world

BENCHES: dict[str, type[Bench]] = {"pipeline": PipelineBench, "blockwise": BlockwiseBench}
"""For each kind of training, what measures its strategies."""


def compare(recipe: Recipe, options: RunOptions, strategies: Sequence[str], *, rounds: int, steps: int) -> Comparison:
    """Train by each strategy in turn, several rounds over, on a process for each device.

    Around every round the machine's own ceiling is measured: how long a step without a schedule takes in one process
    alone, and in as many independent processes at once as there are devices. Predictions are from costs of the blocks,
    scaled to such a step, and from the medians of what the rounds measured of the machine.

    Args:
        recipe: builds the workload
        options: how to run it; its strategy is not read
        strategies: names, `fill` with variants, and peers (see `variants`); speedups are over the first
        rounds: how often each strategy is measured
        steps: updates of each measurement (batches, in blockwise training)

    Raises:
        ConfigError: for an unknown strategy, or a peer that cannot train the workload.
    """
    _check(recipe, recipe.workload(options.seed), options, strategies)
    arguments = (recipe, options, tuple(strategies), rounds, steps)
    if options.devices == 1:
        torch.set_num_threads(options.threads or 1)
        return _measure(*arguments)
    measured: Comparison = launch(
        _measure, arguments, options.devices, device_type=choose_device_type(options.device, options.devices),
        threads=options.threads or 1, timeout_seconds=options.timeout_seconds,
    )  # fmt: skip
    return measured


def _check(recipe: Recipe, workload: Workload, options: RunOptions, strategies: Sequence[str]) -> None:
    """Refuse what can be seen to be wrong before any process is started."""
    for name in strategies:
        options_of(name, options, workload.strategies)
    peers = [name for name in strategies if name in PEERS]
    if peers and options.devices == 1:
        raise ConfigError("torch's pipelines need a process group; compare them on 2 devices or more")
    if peers and workload.length_axis is not None:
        raise ConfigError(
            f"{' and '.join(peers)}: torch's pipelines take batches of one form, and those of recipe '{recipe.name}' differ in "
            "length; leave the peers out, or have all batches padded to one length"
        )


def _measure(recipe: Recipe, options: RunOptions, strategies: tuple[str, ...], rounds: int, steps: int) -> Comparison:
    """Measure on every rank of the run; the result is complete on rank 0."""
    workload = recipe.workload(options.seed)
    world = join_world(options.devices, choose_device_type(options.device, options.devices), options.timeout_seconds)
    bench = BENCHES[workload.kind](workload, options, world, steps)
    costs = bench.costs(strategies)
    bench.plain_seconds(costs, everywhere=True)  # the first run pays for imports and for memory from the system
    loops = list[PlainLoop]()  # before each round, and after the last
    links = list[Link]()

    def look_at_machine() -> None:
        loops.append(bench.plain_loop(costs))
        links.append(bench.link(loops[-1], costs))

    def agreeing() -> Any:
        """Costs that agree with what was seen of the machine until now; the user's are left as they are."""
        return costs if options.costs is not None else bench.calibrated(costs, loops, links)

    look_at_machine()
    planning = world.broadcast(agreeing())
    runs = in_rounds(strategies, rounds, lambda name: bench.run(name, planning), look_at_machine)
    predicting = agreeing()

    around = around_rounds(loops)
    seconds = {name: [r.seconds_per_step for r in mine] for name, mine in runs.items()}
    ceilings = ceiling_figures(seconds, around, options.devices)
    results = [
        {**figures, **ceilings[name], **bench.figures(runs[name], predicting)}
        for name, figures in strategy_figures(seconds).items()
    ]
    calibration = {
        **machine_figures(around, options.devices), "steps": steps, "link": predicting.link.to_json(),
        **bench.calibration(predicting),
    }  # fmt: skip
    last = {name: mine[-1].result for name, mine in runs.items()}
    traces = {name: result.traces[-1] for name, result in last.items() if result is not None and result.traces}
    return Comparison({"calibration": calibration, "results": results}, traces)
