"""Pipelines on virtual devices: real processes run the schedules, while work only waits."""

from collections import Counter

import pytest

from pipestill.compare.real import variant
from pipestill.compare.virtual import VirtualOptions, compare_virtual
from pipestill.costs import Costs, Link
from pipestill.plan import make_plan
from pipestill.schedule import Op
from pipestill.schedule.schedule import Demands

DEVICES, MICROBATCHES, STEPS = 2, 2, 6

CASES = {
    "frozen teacher": (["1f1b", "fill", "fill+split"], Demands()),
    "momentum, views, a loss of whole batches, clipped": (["tspipe", "async"], Demands(True, 2, 2, True, True)),
}


@pytest.mark.parametrize("case", CASES)
def test_virtual_devices_run_what_the_schedule_says(case: str) -> None:
    """Every run ended in a TypeError: virtual stages did not know an argument that the executor had begun to pass."""
    names, demands = CASES[case]
    costs = Costs.uniform(DEVICES, 0.001, 0.001, 0.001, weight=0.0005, views=demands.views)
    costs = costs.with_surroundings(Link(1e-5, 1e9), 1.0)
    options = VirtualOptions(DEVICES, MICROBATCHES, names, rounds=1, steps=STEPS, timeout_seconds=60.0)
    comparison = compare_virtual(costs, demands, options)
    assert [result["strategy"] for result in comparison.figures["results"]] == [*comparison.traces] == names
    for result in comparison.figures["results"]:
        name, trace = result["strategy"], comparison.traces[result["strategy"]]
        strategy, knobs = variant(name)
        plan = make_plan(
            costs, devices=DEVICES, strategy=strategy, microbatches=MICROBATCHES, demands=demands, **knobs
        )  # fmt: skip
        for rank, row in enumerate(plan.schedule.unroll(STEPS)):
            ran = Counter(event.action for event in trace.events if event.rank == rank)
            assert ran == Counter(a for a in row if a.computes and a.op is not Op.DATA), (name, rank)
        assert result["seconds_per_step"] > 0
        assert result["predicted_seconds_per_step"] == plan.prediction.seconds_per_step
        assert result["staleness"] == plan.proof.staleness
