"""Strategies of both kinds of training side by side on real processes."""

import pytest
from support.compared import assert_keys
from support.recipes import Blocks, Vectors

from pipestill.compare.figures import Comparison
from pipestill.compare.real import compare
from pipestill.errors import ConfigError
from pipestill.recipes.run_options import RunOptions

TWO = RunOptions(devices=2, microbatches=2, threads=1, device="cpu", timeout_seconds=60.0)


def check_figures(comparison: Comparison, names: list[str], planned: list[str], rounds: int) -> None:
    results = comparison.figures["results"]
    assert [result["strategy"] for result in results] == names
    assert list(comparison.traces) == planned
    assert results[0]["speedup_spread"] == [1.0, 1.0]
    for result in results:
        low, high = result["seconds_per_step_spread"]
        assert 0 < low <= result["seconds_per_step"] <= high
        assert result["share_of_ceiling"] > 0 and min(result["peak_memory_bytes"]) > 0
        if result["strategy"] in planned:
            assert 0 < result["limit_seconds_per_step"] <= result["predicted_seconds_per_step"] * (1 + 1e-9)
    calibration = comparison.figures["calibration"]
    assert calibration["ceiling"] > 0 and calibration["rounds"] == rounds


@pytest.mark.slow
def test_pipelines_are_compared_on_processes() -> None:
    names = ["reference", "1f1b", "fill+split"]
    comparison = compare(Vectors(), TWO, names, rounds=1, steps=6)
    assert_keys(comparison, "pipeline")
    check_figures(comparison, names, ["1f1b", "fill+split"], rounds=1)
    for result in comparison.figures["results"][1:]:
        assert sum(result["student_partition"]) == sum(result["teacher_partition"]) == 3


def test_blockwise_strategies_are_compared_on_processes() -> None:
    names = ["dp", "relay-dpu", "reference"]
    comparison = compare(Blocks(), TWO, names, rounds=2, steps=6)
    assert_keys(comparison, "blockwise")
    check_figures(comparison, names, ["dp", "relay-dpu"], rounds=2)
    for result in comparison.figures["results"][:2]:
        assert len(result["plan"]) == len(result["memory_bytes"]) == 2
    calibration = comparison.figures["calibration"]
    assert calibration["blocks"] == 3
    assert [len(mine) for mine in calibration["allreduce_seconds"]] == [1, 1, 1]  # of each block, in groups of two


@pytest.mark.slow
def test_peers_are_compared_on_processes() -> None:
    names = ["torch-gpipe", "torch-1f1b"]
    comparison = compare(Vectors(), TWO, names, rounds=1, steps=6)
    assert_keys(comparison, "pipeline")
    check_figures(comparison, names, [], rounds=1)


def test_one_device_is_this_process() -> None:
    comparison = compare(Vectors(), RunOptions(microbatches=2, device="cpu"), ["reference", "fill"], rounds=1, steps=6)
    check_figures(comparison, ["reference", "fill"], ["fill"], rounds=1)


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        (TWO, "relay", "no strategy 'relay'; there are reference"),
        (TWO, "1f1b+split", "no variant '1f1b.split'"),
        (RunOptions(device="cpu"), "torch-1f1b", "compare them on 2 devices or more"),
    ],
    ids=["of blocks", "of another strategy", "on one device"],
)
def test_what_cannot_be_compared_is_refused_before_a_process_starts(options: RunOptions, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(Vectors(), options, [name], rounds=1, steps=6)
