"""Measures strategies on virtual devices: the real runtime, while work and links wait for as long as their costs say."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from pipestill.compare.real import Comparison, variant
from pipestill.costs import Costs
from pipestill.errors import ConfigError
from pipestill.plan import Plan, make_plan
from pipestill.runtime.launch import launch
from pipestill.runtime.transport.virtual import run_virtual
from pipestill.schedule import PIPELINE_STRATEGIES, Trace
from pipestill.schedule.schedule import Demands

Measured = tuple[Trace, float]
_FEWEST, _LONG_SECONDS = 3, 20.0  # steps of a strategy, and the time at which they are enough


@dataclasses.dataclass(frozen=True)
class VirtualOptions:
    """How virtual devices are used."""

    devices: int
    microbatches: int
    strategies: Sequence[str]
    rounds: int
    steps: int
    timeout_seconds: float = 600.0


def compare_virtual(costs: Costs, demands: Demands, options: VirtualOptions) -> Comparison:
    """Run each strategy in turn, `rounds` times over, on `devices` processes that wait instead of computing.

    Beside them, in every round, a trivial pipeline (the student alone, all forwards and then all backwards, stages
    alike): the share of its ideal that it reaches is what this machine's processes and messages leave of any result.
    `speedup` is over the first strategy. Raises `ConfigError` or `PlanError` for what cannot be planned.
    """
    plans = {}
    for name in options.strategies:
        strategy, knobs = variant(name)
        if strategy not in PIPELINE_STRATEGIES:
            raise ConfigError(f"'{strategy}' computes; virtual devices only wait. Compare it on real ones")
        plans[name] = make_plan(
            costs,
            devices=options.devices,
            strategy=strategy,
            microbatches=options.microbatches,
            demands=demands,
            **knobs,
        )
    trivial = _trivial(costs, options)
    everything = [trivial, *plans.values()]
    for plan in everything:
        assert plan.prediction  # with its schedule, found once here and sent to the ranks with the plan
    arguments = (everything, options.rounds, options.steps, options.timeout_seconds)
    measured: list[list[Measured]] = launch(
        _measure, arguments, options.devices, device_type="cpu", threads=1, timeout_seconds=options.timeout_seconds
    )
    return _figures(plans, trivial, measured, options)


def _trivial(costs: Costs, options: VirtualOptions) -> Plan:
    """Stages alike, without a teacher, of the same length of work as the costs' on average."""
    actions = 3 * options.devices * len(costs.views)
    seconds = costs.microbatch_seconds(len(costs.views)) / actions
    alike = dataclasses.replace(Costs.uniform(options.devices, 0.0, seconds, seconds, teacher=False), link=costs.link)
    return make_plan(alike, devices=options.devices, strategy="gpipe", microbatches=2 * options.devices)


def _measure(plans: list[Plan], rounds: int, steps: int, timeout_seconds: float) -> list[list[Measured | None]]:
    """On every rank; complete on rank 0."""

    def count(plan: Plan) -> int:  # fewer where each takes long: they are all alike
        return max(_FEWEST, min(steps, math.ceil(_LONG_SECONDS / plan.prediction.seconds_per_step)))

    return [[run_virtual(plan, count(plan), timeout_seconds) for plan in plans] for _ in range(rounds)]


def _figures(
    plans: dict[str, Plan], trivial: Plan, measured: list[list[Measured]], options: VirtualOptions
) -> Comparison:
    seconds = [[trace.median_seconds_per_step for trace, _ in of_round] for of_round in measured]
    results = []
    for i, (name, plan) in enumerate(plans.items(), start=1):
        mine = [of_round[i] for of_round in seconds]
        ratios = [of_round[1] / of_round[i] for of_round in seconds]
        traces = [of_round[i][0] for of_round in measured]
        results.append({
            "strategy": name,
            "seconds_per_step": median(mine),
            "seconds_per_step_spread": [min(mine), max(mine)],
            "speedup": median(ratios),
            "speedup_spread": [min(ratios), max(ratios)],
            "predicted_seconds_per_step": plan.prediction.seconds_per_step,
            "limit_seconds_per_step": plan.limit_seconds_per_step,
            "utilisation": median(trace.utilisation for trace in traces),
            "predicted_utilisation": plan.prediction.utilisation,
            "bubble": median(trace.bubble for trace in traces),
            "stash_peak": list(traces[-1].stash_peak),
            "staleness": plan.proof.staleness,
            "student_partition": list(plan.student_partition),
            "teacher_partition": list(plan.teacher_partition),
        })  # fmt: skip
    shares = [trivial.prediction.seconds_per_step / of_round[0] for of_round in seconds]
    late = [share for of_round in measured for _, share in of_round]
    calibration: dict[str, Any] = {
        "virtual": True,
        "devices": options.devices,
        "microbatches": options.microbatches,
        "rounds": options.rounds,
        "steps": options.steps,
        "share_of_ideal": median(shares),
        "share_of_ideal_spread": [min(shares), max(shares)],
        "late": median(late),
    }
    last = {name: measured[-1][i][0] for i, name in enumerate(plans, start=1)}
    return Comparison({"calibration": calibration, "results": results}, last)
