"""What both sides of a boundary agree on, and what breaks that."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pipestill.errors import ModelError
from pipestill.model.contracts import AliasLeaf, ConstantLeaf, Contract, TensorLeaf, observe
from pipestill.model.tensor_form import FEW, MORE


def nest(rows: int) -> Any:
    x = torch.arange(rows * 4.0).view(rows, 4)
    return OrderedDict(x=x, pair=(x, [x > 2, "name"]), rows=3 * rows + 1, none=None)


def contract() -> Contract:
    return observe("here", nest(FEW), nest(MORE))


def test_a_contract_tells_what_travels() -> None:
    leaves = contract().leaves
    assert [type(leaf) for leaf in leaves] == [
        TensorLeaf,
        AliasLeaf,
        TensorLeaf,
        ConstantLeaf,
        ConstantLeaf,
        ConstantLeaf,
    ]
    assert [form.shape_of(7) for form in contract().values] == [(7, 4), (7, 4)]
    assert [form.dtype for form in contract().values] == [torch.float32, torch.bool]
    assert contract().num_bytes(7) == 7 * 4 * 5
    assert contract().gradients == []


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_split_and_join_are_inverse(rows: int) -> None:
    value = nest(rows)
    tensors = contract().split(value, rows)
    assert len(tensors) == 2
    back = contract().join(tensors, rows)
    assert type(back) is OrderedDict
    assert back["x"] is back["pair"][0] is value["x"]
    assert back["rows"] == 3 * rows + 1
    assert back["pair"][1][1] == "name"
    assert back["none"] is None


def changed(**changes: Any) -> Any:
    return OrderedDict({**nest(5), **changes})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            changed(x=torch.zeros(5, 3)),
            r"here: the tensor .* was float32 \(5, 4\) on the sample .* now float32 \(5, 3\)",
        ),
        (changed(x=torch.zeros(5, 4).double()), r"now float64 \(5, 4\)"),
        (changed(x="text"), "now 'text'"),
        (changed(rows=17), "the value .* was 16 .* is now 17"),
        (changed(rows=16.0), "was 16 .* is now 16.0"),
        (changed(none=0), "was None .* is now 0"),
        (dict(nest(5)), "the structure"),
        (nest(5) | {"new": 1}, "the structure"),
        (
            changed(pair=(torch.zeros(5, 4), [torch.zeros(5, 4) > 1, "name"])),
            "was 'the one at place 0 again' .* now 'another one'",
        ),
    ],
)
def test_a_broken_contract_says_how(value: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        contract().split(value, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: [0.0] * n, "structure changes with the number of rows"),
        (lambda n: torch.zeros([2] * n), r"changes from torch.float32 \(2, 2\) to torch.float32 \(2, 2, 2\)"),
        (lambda n: torch.zeros(n, dtype=[torch.int8, torch.int16][n - FEW]), "changes from torch.int8"),
        (lambda n: 1 / n, "0.5 is no tensor and changes with the rows"),
        (lambda n: "x" * n, "'xx' is no tensor"),
        (lambda n: np.arange(n), "is no tensor and changes with the rows.*; pass a tensor"),
        (lambda n: [torch.zeros(1), 3][n - FEW], "a tensor changes to 3"),
        (lambda n: [3, torch.zeros(1)][n - FEW], "3 is no tensor"),
    ],
)
def test_what_changes_with_more_than_the_rows_is_refused(make: Callable[[int], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        observe("here", make(FEW), make(MORE))


def test_a_flag_that_follows_from_the_rows_is_refused_when_it_is_wrong() -> None:
    flag = observe("here", FEW > 2, MORE > 2)
    with pytest.raises(ModelError, match="the value"):
        flag.split(True, 8)
