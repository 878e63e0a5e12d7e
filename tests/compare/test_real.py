"""Strategies of both kinds of training side by side on real processes."""

import pytest
from support.block_targets import TwoBlocks
from support.compared import assert_keys

from pipestill.compare.blockwise import compare_blockwise
from pipestill.compare.figures import Comparison
from pipestill.compare.real import compare
from pipestill.recipes.run_options import RunOptions
from pipestill.recipes.soft_target import SoftTarget

SMALL = SoftTarget(teacher_width=4, teacher_depth=2, student_width=4, student_depth=2, batch_size=16)


def check_rounds(comparison: Comparison, names: list[str]) -> None:
    results = comparison.figures["results"]
    assert [result["strategy"] for result in results] == names
    assert results[0]["speedup_spread"] == [1.0, 1.0]
    for result in results:
        low, high = result["seconds_per_step_spread"]
        assert 0 < low <= result["seconds_per_step"] <= high
        assert result["share_of_ceiling"] > 0 and len(result["peak_memory_bytes"]) in (1, 2)
    calibration = comparison.figures["calibration"]
    assert calibration["ceiling"] > 0 and calibration["rounds"] == 2


@pytest.mark.slow
def test_pipelines_are_compared_on_processes() -> None:
    options = RunOptions(devices=2, microbatches=2, threads=1, device="cpu", timeout_seconds=60.0)
    names = ["reference", "sequential", "fill+split", "torch-gpipe"]
    comparison = compare(SMALL, options, names, rounds=2, steps=6, device_type="cpu")
    assert_keys(comparison, "pipeline")
    check_rounds(comparison, names)
    assert list(comparison.traces) == ["sequential", "fill+split"]
    for result in comparison.figures["results"][1:3]:
        assert result["limit_seconds_per_step"] <= result["predicted_seconds_per_step"] * (1 + 1e-9)
        assert sum(result["student_partition"]) == sum(result["teacher_partition"]) == 4


@pytest.mark.slow
def test_blockwise_strategies_are_compared_on_processes() -> None:
    options = RunOptions(devices=2, threads=1, device="cpu", timeout_seconds=60.0)
    names = ["dp", "relay-dpu"]
    comparison = compare_blockwise(TwoBlocks(), options, names, rounds=2, steps=6, device_type="cpu")
    assert_keys(comparison, "blockwise")
    check_rounds(comparison, names)
    for result in comparison.figures["results"]:
        assert result["limit_seconds_per_step"] <= result["predicted_seconds_per_step"] * (1 + 1e-9)
        assert len(result["plan"]) == len(result["memory_bytes"]) == 2
    calibration = comparison.figures["calibration"]
    assert calibration["blocks"] == 2
    assert [len(mine) for mine in calibration["allreduce_seconds"]] == [1, 1]  # of both blocks, in groups of two
    assert comparison.traces.keys() == set(names)
