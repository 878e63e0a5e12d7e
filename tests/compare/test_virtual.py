"""Virtual devices: real processes run the schedules, while work only waits."""

from collections import Counter

import pytest
from support.compared import assert_keys

from pipestill.compare.variants import variant
from pipestill.compare.virtual import VirtualOptions, compare_virtual_blockwise, compare_virtual_pipelines
from pipestill.costs import Costs, Link
from pipestill.errors import ConfigError
from pipestill.plan import make_plan
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES, make_blockwise_plan
from pipestill.schedule import Op
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes
from pipestill.schedule.pipeline.structure import Demands

DEVICES, MICROBATCHES, STEPS, ROWS = 2, 2, 6, 8

CASES = {
    "frozen teacher": (["1f1b", "fill", "fill+split"], Demands()),
    "momentum, views, a loss of whole batches, clipped": (["tspipe", "async"], Demands(True, 2, 2, True, True)),
}


def options(names: list[str]) -> VirtualOptions:
    return VirtualOptions(DEVICES, names, rounds=1, steps=STEPS, timeout_seconds=60.0)


@pytest.mark.parametrize("case", CASES)
def test_pipelines_run_what_the_schedule_says(case: str) -> None:
    """Every run ended in a TypeError: virtual stages did not know an argument that the executor had begun to pass."""
    names, demands = CASES[case]
    costs = Costs.uniform(DEVICES, 0.001, 0.001, 0.001, weight=0.0005, views=demands.views)
    costs = costs.with_surroundings(Link(1e-5, 1e9), 1.0)
    comparison = compare_virtual_pipelines(costs, demands, options(names), microbatches=MICROBATCHES)
    assert_keys(comparison, "virtual pipeline")
    assert [result["strategy"] for result in comparison.figures["results"]] == [*comparison.traces] == names
    for result in comparison.figures["results"]:
        name, trace = result["strategy"], comparison.traces[result["strategy"]]
        strategy, knobs = variant(name, names)
        plan = make_plan(
            costs, devices=DEVICES, strategy=strategy, microbatches=MICROBATCHES, demands=demands, **knobs
        )  # fmt: skip
        for rank, row in enumerate(plan.schedule.unroll(STEPS)):
            ran = Counter(event.action for event in trace.events if event.rank == rank)
            assert ran == Counter(a for a in row if a.computes and a.op is not Op.DATA), (name, rank)
        assert result["seconds_per_step"] > 0
        assert result["predicted_seconds_per_step"] == plan.prediction.seconds_per_step
        assert result["staleness"] == plan.proof.staleness


@pytest.mark.parametrize("name", ["reference", "torch-1f1b"])
def test_what_computes_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="virtual devices only wait"):
        compare_virtual_pipelines(Costs.uniform(DEVICES, 1.0, 1.0, 1.0), Demands(), options([name]), microbatches=2)


def test_blocks_run_what_each_strategy_schedules() -> None:
    times = BlockTimes("block", (4, ROWS), (0.0005, 0.001), (0.001, 0.002), 64, 1000)
    profile, names = BlockProfile((times, times, times)), [*BLOCKWISE_STRATEGIES]
    comparison = compare_virtual_blockwise(profile, options(names), batch=ROWS, slower=1.0)
    assert_keys(comparison, "virtual blockwise")
    assert [result["strategy"] for result in comparison.figures["results"]] == [*comparison.traces] == names
    for result in comparison.figures["results"]:
        plan = make_blockwise_plan(profile, strategy=result["strategy"], devices=2, batch=ROWS)
        trace = comparison.traces[result["strategy"]]
        steps = 1 + max(event.action.step for event in trace.events)
        assert steps >= 6
        for rank, row in enumerate(plan.phases[-1].schedule.unroll(steps)):
            ran = {event.action for event in trace.events if event.rank == rank}
            assert ran == {a for a in row if a.computes and a.op is not Op.DATA}, (result["strategy"], rank)
        assert result["seconds_per_step"] > 0
        assert result["predicted_seconds_per_step"] == plan.seconds_per_batch
