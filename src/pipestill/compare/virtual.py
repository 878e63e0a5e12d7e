"""Compares strategies on virtual devices: the real runtime, while work and links wait for as long as their costs say."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

from pipestill.compare.figures import Comparison, enough_steps, in_rounds, strategy_figures, with_spread
from pipestill.compare.variants import variant
from pipestill.costs import Costs
from pipestill.errors import ConfigError
from pipestill.plan import Plan, make_plan
from pipestill.plan.blockwise.describe import describe
from pipestill.plan.blockwise.plan import BlockwisePlan, make_blockwise_plan
from pipestill.runtime.blockwise.rank import process_groups
from pipestill.runtime.blockwise.virtual import run_virtual_blockwise
from pipestill.runtime.launch import launch
from pipestill.runtime.pipeline.virtual import run_virtual_pipeline
from pipestill.schedule import PIPELINE_STRATEGIES, Trace
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.schedule.pipeline.structure import Demands
from pipestill.train.engine import REFERENCE

P = TypeVar("P")
Runs = dict[str, list[tuple[list[Trace], float]]]
"""By strategy, for each round: the trace of each phase, and the share of the time by which clocks were set back."""

_LONG_SECONDS = 20.0  # a measurement that lasts so long needs no more steps
_ACTION_SECONDS = 0.02  # so long an action is hardly disturbed by what processes on few cores cost each other
_TRIVIAL = "trivial pipeline"


@dataclass(frozen=True)
class VirtualOptions:
    """What is measured on virtual devices.

    Args:
        devices: ranks, each one process
        strategies: names; speedups are over the first
        rounds: how often each strategy is measured, in turn
        steps: updates of a measurement (batches in blockwise training); fewer where each takes long
        timeout_seconds: deadline of every wait
    """

    devices: int
    strategies: Sequence[str]
    rounds: int
    steps: int
    timeout_seconds: float = 600.0


def compare_virtual_pipelines(costs: Costs, demands: Demands, options: VirtualOptions, *, microbatches: int) -> Comparison:
    """Run pipelines in turn, several rounds over, on processes that wait instead of computing.

    Beside them, in every round, a trivial pipeline runs: the student alone, all forwards and then all backwards, stages
    alike. The share that it reaches of its ideal is what this machine's processes and messages leave of any result.

    Args:
        costs: of the blocks, for one microbatch
        demands: what the task asks of a schedule
        options: strategies, devices and rounds
        microbatches: slices of a batch

    Raises:
        ConfigError: for an unknown strategy.
        PlanError: for one that cannot be planned.
    """
    plans = {name: _pipeline(name, costs, demands, options.devices, microbatches) for name in options.strategies}
    every = {_TRIVIAL: _trivial(costs, options.devices), **plans}
    steps = {
        name: [enough_steps(options.steps, 3, plan.prediction.seconds_per_step, _LONG_SECONDS)] for name, plan in every.items()
    }
    runs = _launched(_run_pipelines, every, steps, options)
    seconds = {name: [traces[0].median_seconds_per_step for traces, _ in mine] for name, mine in runs.items()}
    ideal = every[_TRIVIAL].prediction.seconds_per_step
    calibration = {
        "microbatches": microbatches,
        **with_spread("share_of_ideal", [ideal / mine for mine in seconds.pop(_TRIVIAL)]),
    }
    results = strategy_figures(seconds)
    for name, plan in plans.items():
        traces = [traces[0] for traces, _ in runs[name]]
        results[name] |= {
            "predicted_seconds_per_step": plan.prediction.seconds_per_step,
            "limit_seconds_per_step": plan.limit_seconds_per_step,
            "utilisation": median(trace.utilisation for trace in traces),
            "predicted_utilisation": plan.prediction.utilisation,
            "bubble": median(trace.bubble for trace in traces),
            "stash_peak": list(traces[-1].stash_peak),
            "staleness": plan.proof.staleness,
            "student_partition": list(plan.student_partition),
            "teacher_partition": list(plan.teacher_partition),
        }
    return _comparison(options, calibration, results, runs)


def compare_virtual_blockwise(
    profile: BlockProfile, options: VirtualOptions, *, batch: int, memory_bytes: float | None = None, slower: float | None = None
) -> Comparison:
    """Run strategies of blockwise training in turn, several rounds over, on processes that wait instead of computing.

    A step trains every block on one batch.

    Args:
        profile: times of the blocks
        options: strategies, devices and rounds
        batch: rows of a batch
        memory_bytes: most that a rank may hold (default: no limit)
        slower: how many seconds a second of the profile lasts, so that actions are long beside what processes that share
            a few cores cost each other; figures are divided by it (default: as many as make a mean action of the first
            strategy last 20 ms, and at least 1)

    Raises:
        PlanError: for a strategy that is unknown or cannot be planned.
    """
    plans = {
        name: make_blockwise_plan(profile, strategy=name, devices=options.devices, batch=batch, memory_bytes=memory_bytes)
        for name in options.strategies
    }
    if slower is None:
        slower = max(1.0, _ACTION_SECONDS / _mean_action_seconds(next(iter(plans.values()))))
    slowed = {name: _slowed(plan, slower) for name, plan in plans.items()}
    steps = {name: _steps_of_phases(plan, options.steps) for name, plan in slowed.items()}
    runs = _launched(_run_blockwise, slowed, steps, options)
    runs = {name: [([_at_speed(t, slower) for t in traces], late) for traces, late in mine] for name, mine in runs.items()}
    seconds = {
        name: [plan.total([trace.median_seconds_per_step for trace in traces]) for traces, _ in runs[name]]
        for name, plan in plans.items()
    }
    results = strategy_figures(seconds)
    for name, plan in plans.items():
        busy = [plan.utilisation_in(traces, s) for (traces, _), s in zip(runs[name], seconds[name], strict=True)]
        results[name] |= {
            "predicted_seconds_per_step": plan.seconds_per_batch,
            "limit_seconds_per_step": plan.limit_seconds_per_batch,
            "utilisation": median(busy),
            "predicted_utilisation": plan.utilisation,
            "cost_model_seconds_per_step": plan.chosen.seconds if plan.chosen else None,
            "window": plan.window,
            "memory_bytes": list(plan.memory_bytes),
            "plan": describe(plan),
        }
    return _comparison(options, {"batch": batch, "slower": slower}, results, runs)


def _comparison(
    options: VirtualOptions, calibration: dict[str, Any], results: dict[str, dict[str, Any]], runs: Runs
) -> Comparison:
    """Put the figures together; `calibration` holds those that only this kind of training has."""
    late = median(late for mine in runs.values() for _, late in mine)
    common = {"virtual": True, "devices": options.devices, "rounds": options.rounds, "steps": options.steps, "late": late}
    traces = {name: runs[name][-1][0][-1] for name in results}
    return Comparison({"calibration": {**common, **calibration}, "results": [*results.values()]}, traces)


def _launched(
    run: Callable[..., Runs], plans: Mapping[str, P], steps: Mapping[str, Sequence[int]], options: VirtualOptions
) -> Runs:
    """Call `run` in a process for each device, and give what it returns on rank 0."""
    runs: Runs = launch(
        run, (plans, steps, options.rounds, options.timeout_seconds), options.devices, device_type="cpu", threads=1,
        timeout_seconds=options.timeout_seconds,
    )  # fmt: skip
    return runs


# ---------------------------------------------------------------- pipelines


def _pipeline(name: str, costs: Costs, demands: Demands, devices: int, microbatches: int) -> Plan:
    strategy, knobs = variant(name, (REFERENCE, *PIPELINE_STRATEGIES))
    if strategy not in PIPELINE_STRATEGIES:
        raise ConfigError(f"'{strategy}' computes; virtual devices only wait. Compare it on real ones")
    return make_plan(costs, devices=devices, strategy=strategy, microbatches=microbatches, demands=demands, **knobs)


def _trivial(costs: Costs, devices: int) -> Plan:
    """Plan stages alike, without a teacher, whose actions last as long as those of the costs on average."""
    actions = 3 * devices * len(costs.views)
    seconds = costs.microbatch_seconds(len(costs.views)) / actions
    alike = dataclasses.replace(Costs.uniform(devices, 0.0, seconds, seconds, teacher=False), link=costs.link)
    return make_plan(alike, devices=devices, strategy="gpipe", microbatches=2 * devices)


def _run_pipelines(plans: Mapping[str, Plan], steps: Mapping[str, Sequence[int]], rounds: int, timeout_seconds: float) -> Runs:
    """Run every plan in every round, on every rank; complete on rank 0."""
    return in_rounds(plans, rounds, lambda name: run_virtual_pipeline(plans[name], steps[name][0], timeout_seconds))


# ---------------------------------------------------------------- blockwise


def _steps_of_phases(plan: BlockwisePlan, batches: int) -> list[int]:
    """Choose the steps of each phase: for as many batches as asked for, or fewer where each takes long."""
    return [
        enough_steps(
            math.ceil(batches / phase.window),
            max(6, 3 * (phase.schedule.lookahead + 1)),  # a third of the steps is steady
            trace.seconds_per_step,
            _LONG_SECONDS / len(plan.phases),
        )
        for phase, trace in zip(plan.phases, plan.predictions, strict=True)
    ]


def _mean_action_seconds(plan: BlockwisePlan) -> float:
    seconds = [event.seconds for trace in plan.predictions for event in trace.events if event.seconds > 0]
    return sum(seconds) / len(seconds) if seconds else _ACTION_SECONDS


def _slowed(plan: BlockwisePlan, factor: float) -> BlockwisePlan:
    """Make the same plan with everything lasting `factor` times as long."""
    profile = plan.costs.profile.scaled(factor, transfers=True)
    return dataclasses.replace(plan, costs=dataclasses.replace(plan.costs, profile=profile))


def _at_speed(trace: Trace, slower: float) -> Trace:
    """Convert a trace to seconds of the profile."""
    events = (dataclasses.replace(e, start=e.start / slower, end=e.end / slower) for e in trace.events)
    return dataclasses.replace(trace, events=tuple(events))


def _run_blockwise(
    plans: Mapping[str, BlockwisePlan], steps: Mapping[str, Sequence[int]], rounds: int, timeout_seconds: float
) -> Runs:
    """Run every plan in every round, on every rank; complete on rank 0."""
    groups = process_groups(list(plans.values()))
    return in_rounds(plans, rounds, lambda name: run_virtual_blockwise(plans[name], steps[name], groups, timeout_seconds))
