"""Blocks that learn alone on virtual devices: real processes run the schedules, while work only waits."""

from pipestill.compare.virtual_blockwise import VirtualBlockwiseOptions, compare_virtual_blockwise
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES, make_blockwise_plan
from pipestill.schedule import Op
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes

ROWS = 8
TIMES = BlockTimes("block", (4, ROWS), (0.0005, 0.001), (0.001, 0.002), 64, 1000)


def test_virtual_devices_run_what_each_strategy_schedules() -> None:
    profile, names = BlockProfile((TIMES, TIMES, TIMES)), [*BLOCKWISE_STRATEGIES]
    options = VirtualBlockwiseOptions(2, ROWS, names, rounds=1, steps=6, slower=1.0, timeout_seconds=60.0)
    comparison = compare_virtual_blockwise(profile, options)
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
