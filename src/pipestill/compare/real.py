"""Measures strategies side by side in one run, beside what the machine itself can do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist

from pipestill.compare.figures import (
    Comparison,
    PlainLoop,
    around_rounds,
    calibrated,
    ceiling_figures,
    machine_figures,
    strategy_figures,
)
from pipestill.compare.rounds import in_rounds
from pipestill.compare.variants import PEERS, variant
from pipestill.costs import Costs, Link
from pipestill.errors import ConfigError
from pipestill.model.dry_run import dry_run
from pipestill.model.nests import num_rows
from pipestill.recipes.recipe import Recipe, Workload
from pipestill.recipes.run_options import RunOptions
from pipestill.runtime.launch import launch
from pipestill.runtime.memory import peak_bytes, reset_peak
from pipestill.runtime.world import Processes, device_of
from pipestill.schedule.simulate import simulate
from pipestill.train.engine import REFERENCE
from pipestill.train.pipeline import PipelineEngine
from pipestill.train.result import Result


@dataclass(frozen=True)
class Round:
    """One strategy in one round: the median seconds of its steady steps, and the run it comes from (None: a peer's)."""

    seconds_per_step: float
    peak_memory_bytes: list[int]
    result: Result | None


def compare(
    recipe: Recipe, options: RunOptions, strategies: Sequence[str], *, rounds: int, steps: int, device_type: str
) -> Comparison:
    """Train `steps` steps with each strategy in turn, `rounds` times over, on `options.devices` processes.

    Around every round the machine's own ceiling is measured: how long a step of the plain loop takes in one process
    alone, and in as many independent processes at once as there are devices. `speedup` is over the first strategy, as
    the median of the rounds' own ratios; spreads are the least and the largest. Predictions are from the blocks'
    profile, scaled to the plain loop's step, and from the medians of what the rounds measured of link and neighbours.
    Raises `ConfigError` for an unknown strategy.
    """
    for strategy in strategies:
        variant(strategy)
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
    probe = recipe.workload(options.seed)
    batch_size = probe.train_loader.batch_size or 1
    num_samples = sum(num_rows(inputs, "a batch") for inputs, _ in probe.train_loader) // batch_size * batch_size
    if num_samples == 0:
        raise ConfigError(f"batch_size {batch_size} is more than there are samples; comparing needs whole batches")
    workload = recipe.workload(options.seed, num_samples)
    peers = [name for name in strategies if variant(name)[0] in PEERS]
    if peers and workload.length_axis is not None:
        raise ConfigError(
            f"{' and '.join(peers)}: torch's pipelines take batches of one form, and those of recipe '{recipe.name}' differ in "
            "length; leave the peers out, or have all batches padded to one length"
        )
    _plain_loop(workload, options, steps)  # the first run pays for imports and for memory from the system
    links, loops = list[Link](), list[PlainLoop]()  # of before each round, and of after the last
    seen = workload.task().demands.teacher_views

    def look_at_machine() -> None:
        loops.append(_plain_loops(workload, options, steps))
        links.append(_link(workload, options, loops[-1].alone_seconds))

    def agreeing(costs: Costs) -> Costs:
        return calibrated(costs, loops, links, microbatches=options.microbatches, teacher_views=seen)

    look_at_machine()
    if options.costs is None:
        measured = _costs(workload, options, any(variant(name)[1].get("split_backward") for name in strategies))
        costs = _shared(agreeing(measured))
    else:
        costs = Costs.load(options.costs)

    def run(name: str) -> Round:
        barrier()
        return _run(name, workload, options, costs, steps)

    runs = in_rounds(strategies, rounds, run, look_at_machine)
    predicting = agreeing(costs) if options.costs is None else costs
    return _figures(options, runs, around_rounds(loops), predicting, steps)


def _link(workload: Workload, options: RunOptions, step_seconds: float) -> Link:
    """The link now, for actions of the length that a step's have on average."""
    if not dist.is_initialized():
        return Link()
    trainer = workload.trainer(workload.task(), _plain(options, "sequential"))
    first = next(iter(workload.train_loader))
    rows = math.ceil(num_rows(first[0], "a batch") / options.microbatches)
    assert isinstance(trainer.engine, PipelineEngine)
    return trainer.engine.measure_link(Processes(), tuple(first), rows, step_seconds / options.microbatches)


def _plain_loops(workload: Workload, options: RunOptions, steps: int) -> PlainLoop:
    """Seconds of a step of the plain loop in one process alone, and in all at once."""
    alone = _plain_loop(workload, options, steps, only_rank_0=True)
    return PlainLoop(alone, _plain_loop(workload, options, steps))


def _plain_loop(workload: Workload, options: RunOptions, steps: int, only_rank_0: bool = False) -> float:
    """Seconds of a step of the plain loop: the slowest process's, in all of them at once or in rank 0's alone."""
    barrier()
    seconds = 0.0
    if not only_rank_0 or rank_here() == 0:
        seconds = _train(workload, options.as_reference(), steps).seconds_per_step
    return slowest(seconds)


def slowest(seconds: float) -> float:
    """The most of all processes; on all of them together."""
    if not dist.is_initialized():
        return seconds
    every: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(every, seconds)
    return max(every)


def _train(workload: Workload, options: RunOptions, steps: int) -> Result:
    task = workload.task()
    return workload.trainer(task, options).fit(workload.train_loader, steps=steps)


def _costs(workload: Workload, options: RunOptions, split: bool) -> Costs:
    """Costs of every block, as a run would measure them itself; with `split`, of both halves of the backwards."""
    plain = _plain(options, "fill" if split else "sequential")
    trained = _train(workload, dataclasses.replace(plain, split_backward=split or plain.split_backward), 2)
    assert trained.plan is not None
    costs: Costs = trained.plan.costs
    return costs


def _run(name: str, workload: Workload, options: RunOptions, costs: Costs, steps: int) -> Round:
    strategy, knobs = variant(name)
    if strategy in PEERS:
        return _run_peer(PEERS[strategy], workload, options, costs, steps)
    if strategy == REFERENCE:
        result = _train(workload, options.as_reference(), steps)
    else:
        chosen = dataclasses.replace(_plain(options, strategy), **knobs)
        trainer = workload.trainer(workload.task(), chosen, costs=costs)
        result = trainer.fit(workload.train_loader, steps=steps)
    return Round(result.seconds_per_step, result.peak_memory_bytes, result)


def _plain(options: RunOptions, strategy: str) -> RunOptions:
    """The options for a strategy; knobs that only `fill` has are left to it."""
    own: dict[str, Any] = {"run_ahead": None, "staleness": None, "split_backward": False, "stash": None}
    return dataclasses.replace(options, strategy=strategy, costs=None, **({} if strategy == "fill" else own))


def _run_peer(
    kind: Literal["1f1b", "gpipe"], workload: Workload, options: RunOptions, costs: Costs, steps: int
) -> Round:
    """torch.distributed.pipelining on the partition that our own 1F1B would take."""
    from pipestill.runtime.pipeline.torch_pipelining import train_with_torch

    if not dist.is_initialized():
        raise ConfigError("torch's pipelines need a process group; compare them on 2 devices or more")
    task = workload.task()
    trainer = workload.trainer(task, _plain(options, "1f1b"), costs=costs)
    inputs, targets = next(iter(workload.train_loader))
    batches = list(_repeated(workload, steps))  # read beforehand: ours are read ahead by a thread
    device = device_of(rank_here(), trainer.device_type)
    reset_peak(device)
    seconds = train_with_torch(
        task, dry_run(task, inputs, targets), trainer.engine.plan(costs, len(batches)), batches,
        kind=kind, optimizer=trainer.make_optimizer, seed=options.seed, device=device,
    )  # fmt: skip
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, peak_bytes(device))
    third = len(seconds) // 3
    return Round(median(seconds[third:]), peaks, None)


def _repeated(workload: Workload, steps: int) -> Iterator[tuple[Any, Any]]:
    """`steps` batches that are the same on every rank."""
    torch.manual_seed(0)
    count = 0
    while True:
        for inputs, targets in workload.train_loader:
            if count == steps:
                return
            count += 1
            yield inputs, targets


def _figures(
    options: RunOptions, runs: dict[str, list[Round]], loops: Sequence[PlainLoop], costs: Costs, steps: int
) -> Comparison:
    """`loops`: the plain loop around each round."""
    seconds = {name: [r.seconds_per_step for r in rounds] for name, rounds in runs.items()}
    results, beside, traces = strategy_figures(seconds), ceiling_figures(seconds, loops, options.devices), {}
    for name, rounds in runs.items():
        result = rounds[-1].result
        results[name] |= {**beside[name], "peak_memory_bytes": rounds[-1].peak_memory_bytes}
        if result is not None and result.plan is not None and result.trace is not None:
            traces[name] = result.trace
            stages = costs.stages(result.plan.student_partition, result.plan.teacher_partition)
            prediction = simulate(result.plan.schedule, stages)
            results[name] |= {
                "predicted_seconds_per_step": prediction.seconds_per_step,
                "limit_seconds_per_step": stages.limit_seconds_per_step(
                    options.microbatches, result.plan.demands.teacher_views
                ),
                "utilisation": median(r.result.utilisation for r in rounds if r.result),
                "predicted_utilisation": prediction.utilisation,
                "bubble": median(r.result.bubble for r in rounds if r.result),
                "stash_peak": list(result.trace.stash_peak),
                "staleness": result.staleness,
                "student_partition": list(result.plan.student_partition),
                "teacher_partition": list(result.plan.teacher_partition),
            }
    calibration = {
        **machine_figures(loops, options.devices),
        "microbatches": options.microbatches,
        "steps": steps,
        "interference": costs.interference,
        "link": costs.link.to_json(),
    }
    return Comparison({"calibration": calibration, "results": [*results.values()]}, traces)


def _shared(costs: Costs) -> Costs:
    """Those of rank 0, everywhere."""
    box = [costs]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def rank_here() -> int:
    """The rank of this process, 0 where there is one only."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for every process, where there are several."""
    if dist.is_initialized():
        dist.barrier()
