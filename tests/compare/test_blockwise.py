"""Strategies of blockwise training side by side on real processes."""

from support.block_targets import TwoBlocks

from pipestill.compare.blockwise import compare_blockwise
from pipestill.recipes.run_options import RunOptions


def test_strategies_are_compared_on_processes() -> None:
    options = RunOptions(devices=2, threads=1, device="cpu", timeout_seconds=60.0)
    names = ["dp", "relay-dpu"]
    comparison = compare_blockwise(TwoBlocks(), options, names, rounds=2, steps=6, device_type="cpu")
    results = comparison.figures["results"]
    assert [result["strategy"] for result in results] == names
    assert results[0]["speedup_spread"] == [1.0, 1.0]
    for result in results:
        low, high = result["seconds_per_step_spread"]
        assert 0 < low <= result["seconds_per_step"] <= high
        assert result["limit_seconds_per_step"] <= result["predicted_seconds_per_step"] * (1 + 1e-9)
        assert result["share_of_ceiling"] > 0 and len(result["plan"]) == len(result["memory_bytes"]) == 2
    calibration = comparison.figures["calibration"]
    assert calibration["ceiling"] > 0 and (calibration["rounds"], calibration["blocks"]) == (2, 2)
    assert [len(mine) for mine in calibration["allreduce_seconds"]] == [1, 1]  # of both blocks, in groups of two
    assert comparison.traces.keys() == set(names)
