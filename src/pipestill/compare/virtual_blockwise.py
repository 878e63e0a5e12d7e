"""Measures strategies of blockwise training on virtual devices: the real runtime, while work and links wait."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pipestill.compare.real import Comparison
from pipestill.plan.blockwise.plan import BlockwisePlan, make_blockwise_plan
from pipestill.plan.describe import describe
from pipestill.runtime.blockwise.groups import process_groups
from pipestill.runtime.blockwise.virtual import run_virtual_blocks
from pipestill.runtime.launch import launch
from pipestill.schedule import Trace
from pipestill.schedule.blockwise.profile import BlockProfile

Measured = tuple[list[Trace], float]
_FEWEST, _LONG_SECONDS = 6, 20.0  # steps of a phase, and the time at which they are enough
_ACTION_SECONDS = 0.02


@dataclass(frozen=True)
class VirtualBlockwiseOptions:
    """How virtual devices are used. `steps`: batches of a measurement, at least.

    `slower`: how many seconds a second of the costs lasts, so that actions are long beside what processes that share a few
    cores cost each other; figures are divided by it. By default as many as make a mean action of the first strategy last
    20 ms, and at least one.
    """

    devices: int
    batch: int
    strategies: Sequence[str]
    rounds: int
    steps: int
    memory_bytes: float | None = None
    slower: float | None = None
    timeout_seconds: float = 600.0


def compare_virtual_blockwise(profile: BlockProfile, options: VirtualBlockwiseOptions) -> Comparison:
    """Run each strategy in turn, `rounds` times over, on `devices` processes that wait instead of computing.

    Times are of training every block on one batch, in the steady state. `speedup` is over the first strategy, as the median
    of the rounds' own ratios. Raises `PlanError` for what cannot be planned.
    """
    plans = {
        name: make_blockwise_plan(
            profile, strategy=name, devices=options.devices, batch=options.batch, memory_bytes=options.memory_bytes
        )
        for name in options.strategies
    }
    for plan in plans.values():
        assert plan.predictions  # simulated once here, and sent to the ranks with the plan
    slower = options.slower or max(1.0, _ACTION_SECONDS / _mean_action_seconds(next(iter(plans.values()))))
    slowed = [_slowed(plan, slower) for plan in plans.values()]
    arguments = (slowed, options.rounds, options.steps, options.timeout_seconds)
    measured: list[list[Measured]] = launch(
        _measure, arguments, options.devices, device_type="cpu", threads=1, timeout_seconds=options.timeout_seconds
    )
    return _figures(plans, measured, options, slower)


def _mean_action_seconds(plan: BlockwisePlan) -> float:
    events = [event for trace in plan.predictions for event in trace.events if event.seconds > 0]
    return sum(event.seconds for event in events) / len(events) if events else _ACTION_SECONDS


def _slowed(plan: BlockwisePlan, factor: float) -> BlockwisePlan:
    """The same schedules where everything lasts `factor` times as long."""
    profile = plan.costs.profile.scaled(factor, transfers=True)
    return dataclasses.replace(plan, costs=dataclasses.replace(plan.costs, profile=profile))


def _measure(plans: list[BlockwisePlan], rounds: int, steps: int, timeout_seconds: float) -> list[list[Measured | None]]:
    """On every rank; complete on rank 0."""
    groups = process_groups(plans)
    counts = [_counts(plan, steps) for plan in plans]
    return [
        [run_virtual_blocks(plan, count, groups, timeout_seconds) for plan, count in zip(plans, counts, strict=True)]
        for _ in range(rounds)
    ]


def _counts(plan: BlockwisePlan, steps: int) -> list[int]:
    """Steps of each phase: for as many batches as asked for, fewer where each takes long: they are all alike."""
    counts = []
    for phase, trace in zip(plan.phases, plan.predictions, strict=True):
        long = math.ceil(_LONG_SECONDS / len(plan.phases) / trace.seconds_per_step)
        ranks = 3 * (phase.schedule.lookahead + 1)  # a third of the steps is steady
        counts.append(max(_FEWEST, ranks, min(math.ceil(steps / phase.window), long)))
    return counts


def _figures(
    plans: dict[str, BlockwisePlan], measured: list[list[Measured]], options: VirtualBlockwiseOptions, slower: float
) -> Comparison:
    seconds = [
        [
            plan.total([trace.median_seconds_per_step / slower for trace in traces])
            for plan, (traces, _) in zip(plans.values(), of_round, strict=True)
        ]
        for of_round in measured
    ]
    results = []
    for i, (name, plan) in enumerate(plans.items()):
        mine = [of_round[i] for of_round in seconds]
        ratios = [of_round[0] / of_round[i] for of_round in seconds]
        busy = [_busy(plan, of_round[i][0]) / slower for of_round in measured]
        results.append({
            "strategy": name,
            "seconds_per_step": median(mine),
            "seconds_per_step_spread": [min(mine), max(mine)],
            "speedup": median(ratios),
            "speedup_spread": [min(ratios), max(ratios)],
            "predicted_seconds_per_step": plan.seconds_per_batch,
            "limit_seconds_per_step": plan.limit_seconds_per_batch,
            "utilisation": median(b / (options.devices * s) for b, s in zip(busy, mine, strict=True)),
            "predicted_utilisation": _busy(plan, plan.predictions) / (options.devices * plan.seconds_per_batch),
            "cost_model_seconds_per_step": plan.chosen.seconds if plan.chosen else None,
            "window": max(phase.window for phase in plan.phases),
            "memory_bytes": list(plan.memory_bytes),
            "plan": describe(plan),
        })  # fmt: skip
    late = [share for of_round in measured for _, share in of_round]
    calibration: dict[str, Any] = {
        "virtual": True, "devices": options.devices, "batch": options.batch, "rounds": options.rounds,
        "steps": options.steps, "late": median(late), "slower": slower,
    }  # fmt: skip
    last = {name: _at_speed(measured[-1][i][0][-1], slower) for i, name in enumerate(plans)}
    return Comparison({"calibration": calibration, "results": results}, last)


def _at_speed(trace: Trace, slower: float) -> Trace:
    """The trace in the seconds of the costs."""
    events = (dataclasses.replace(e, start=e.start / slower, end=e.end / slower) for e in trace.events)
    return dataclasses.replace(trace, events=tuple(events))


def _busy(plan: BlockwisePlan, traces: Sequence[Trace]) -> float:
    """Seconds of work of all ranks for one batch."""
    return sum(sum(t.busy_seconds_per_step()) / p.window for t, p in zip(traces, plan.phases, strict=True))
