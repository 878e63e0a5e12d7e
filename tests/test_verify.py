"""States of models compared, with known differences."""

import math
from typing import Any

import pytest
import torch
from support.recipes import Blocks, Vectors

from pipestill.recipes.run_options import RunOptions
from pipestill.verify import TOLERANCE, TRANSPORTS, Difference, differences, is_rounding, train_few, verify


def test_equal_tensors_do_not_differ() -> None:
    state = {"weight": torch.randn(3, 2), "count": torch.tensor(7)}
    assert differences(state, {name: tensor.clone() for name, tensor in state.items()}) == {}


def test_the_largest_difference_is_relative_to_the_largest_entry() -> None:
    expected, got = {"weight": torch.tensor([4.0, -8.0, 1.0])}, {"weight": torch.tensor([4.0, -8.0, 3.0])}
    assert differences(expected, got) == {"weight": Difference(2.0, 0.25)}


def test_the_last_bit_differs() -> None:
    one = torch.ones(1, dtype=torch.float64)
    found = differences({"weight": one}, {"weight": torch.nextafter(one, 2 * one)})["weight"]
    assert 0 < found.absolute < 1e-15
    assert is_rounding(found, TOLERANCE)
    assert not is_rounding(found, 0.0)


def test_what_should_be_zero_is_never_rounding() -> None:
    found = differences({"weight": torch.zeros(2)}, {"weight": torch.full((2,), 1e-30)})["weight"]
    assert not is_rounding(found, TOLERANCE)


def test_nan_differs_from_everything() -> None:
    nan = torch.tensor([math.nan])
    for other in (nan.clone(), torch.ones(1)):
        found = differences({"weight": nan}, {"weight": other})["weight"]
        assert math.isnan(found.absolute)
        assert not is_rounding(found, TOLERANCE)


COMMON = (
    "strategy devices steps transports exact max_abs_difference max_relative_difference tolerance staleness rows_split dtype "
    "batch_norm whole_backwards problems"
)
KEYS = {
    "pipeline": f"{COMMON} microbatches microbatch_difference microbatch_difference_missing versions",
    "blockwise": f"{COMMON} ranks",
}
"""What `check --json` prints of each kind; none may go."""


def options_of(strategy: str, devices: int = 2) -> RunOptions:
    return RunOptions(devices=devices, strategy=strategy, microbatches=3, device="cpu", timeout_seconds=60.0)


def check(recipe: Any, options: RunOptions, transports: tuple[str, ...] = ("in-process",)) -> dict[str, Any]:
    return verify(recipe, options, steps=8, transports=transports, device_type="cpu")


def test_a_pipeline_equals_the_plain_loop() -> None:
    result = check(Vectors(), options_of("fill"))
    assert result.keys() >= set(KEYS["pipeline"].split())
    assert result["exact"]
    assert (result["problems"], result["max_abs_difference"], result["tolerance"]) == ([], 0.0, 0.0)
    assert result["microbatch_difference"] < 1e-6
    assert result["microbatch_difference_missing"] is None
    assert [version["student"] for version in result["versions"][:3]] == [(0,), (1,), (2,)]


def test_blocks_equal_each_trained_alone() -> None:
    result = check(Blocks(), options_of("relay-dpu"))
    assert result.keys() >= set(KEYS["blockwise"].split())
    assert result["exact"]
    assert (result["problems"], result["rows_split"], result["dtype"]) == ([], False, "float32")
    assert len(result["ranks"]) == 2


def test_where_rows_are_split_sums_are_rounded_in_another_order() -> None:
    result = check(Blocks(), options_of("dp"))
    assert result["rows_split"]
    assert (result["dtype"], result["batch_norm"]) == ("float64", "frozen")
    assert result["max_relative_difference"] <= result["tolerance"] == 1e-9
    assert not result["problems"]


@pytest.mark.parametrize("kind", KEYS)
def test_the_plain_loop_has_no_plan(kind: str) -> None:
    result = check(Vectors() if kind == "pipeline" else Blocks(), options_of("reference", devices=1))
    assert result.keys() >= set(KEYS[kind].split())
    assert result["exact"]


def test_processes_give_the_same_weights() -> None:
    result = check(Vectors(), options_of("1f1b"), TRANSPORTS)
    assert result["transports"] == ["in-process", "process-group"]
    assert result["exact"]


def test_weights_that_differ_are_named() -> None:
    result = check(Vectors(forgetful=True), options_of("fill"))
    assert not result["exact"]
    assert result["max_abs_difference"] > 0
    assert all("differs from the reference by up to" in problem for problem in result["problems"])
    assert any("'student.0.weight'" in problem for problem in result["problems"])
    assert not any("'teacher." in problem for problem in result["problems"])


def test_a_few_steps_end_with_a_short_batch() -> None:
    _, result = train_few(Vectors(), options_of("reference", devices=1), 7)
    assert (result.steps, result.samples) == (7, 6 * 16 + 6)
