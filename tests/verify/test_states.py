"""States of models compared, with known differences."""

import math

import torch

from pipestill.verify.states import TOLERANCE, Difference, differences, is_rounding


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
