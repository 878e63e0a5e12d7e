"""What both sides of a boundary agree on, and what breaks that."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from pipestill.errors import ModelError
from pipestill.model.contracts import FEW, MORE, AliasLeaf, ConstantLeaf, Contract, LinearInRows, TensorForm, TensorLeaf, observe


def nest(rows: int) -> Any:
    x = torch.arange(rows * 4.0).view(rows, 4)
    return OrderedDict(x=x, pair=(x, [x > 2, "name"]), rows=3 * rows + 1, none=None)


def contract() -> Contract:
    return observe("here", nest(FEW), nest(MORE))


def test_a_contract_tells_what_travels() -> None:
    leaves = contract().leaves
    assert [type(leaf) for leaf in leaves] == [TensorLeaf, AliasLeaf, TensorLeaf, ConstantLeaf, ConstantLeaf, ConstantLeaf]
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
        (changed(x=torch.zeros(5, 3)), r"here: the tensor .* was float32 \(5, 4\) on the sample .* now float32 \(5, 3\)"),
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


CPU = torch.device("cpu")


def test_numbers_follow_the_rows() -> None:
    assert LinearInRows.between(2, 3) == LinearInRows(1, 0)
    assert LinearInRows.between(11, 16).of(10) == 51
    assert LinearInRows.between(7, 7).of(100) == 7


LAYOUTS: dict[str, Callable[[int], Tensor]] = {
    "contiguous": lambda n: torch.randn(n, 4, 5),
    "scalar": lambda n: torch.randn(()),
    "channels last": lambda n: torch.randn(n, 4, 3, 2).to(memory_format=torch.channels_last),
    "rows fastest": lambda n: torch.randn(5, n).t(),
    "rows in the middle": lambda n: torch.randn(5, n, 2).transpose(0, 1),
    "gaps between rows": lambda n: torch.randn(n, 12).chunk(3, -1)[1],
    "gaps between features": lambda n: torch.randn(n, 12)[:, ::2],
    "repeated features": lambda n: torch.randn(n, 1).expand(n, 6),
    "repeated rows": lambda n: torch.randn(6).expand(n, 6),
    "one number": lambda n: torch.randn(()).expand(n, 6),
    "repeated and turned": lambda n: torch.randn(1, 4, n).expand(3, 4, n).transpose(0, 2),
    "overlapping windows": lambda n: torch.randn(n, 8).unfold(1, 3, 1),
    "axes of one": lambda n: torch.randn(4, 1, n, 1).permute(2, 1, 0, 3),
    "without a number": lambda n: torch.randn(n, 0, 3),
}


def strides(tensor: Tensor) -> list[int]:
    """Those that say anything."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_strides_survive_the_journey(name: str, rows: int) -> None:
    make = LAYOUTS[name]
    form = TensorForm.between(make(FEW), make(MORE))
    tensor = make(rows)
    packed = form.pack(tensor, rows)
    assert packed.shape == form.empty(rows, CPU).shape
    assert packed.is_contiguous()
    arrived = form.unpack(packed.clone(), rows)
    assert torch.equal(arrived, tensor)
    if name != "overlapping windows":  # which nothing but the same memory could have
        assert strides(arrived) == strides(tensor)


def test_packing_does_not_copy_what_has_no_gaps() -> None:
    for name in ("contiguous", "channels last", "rows fastest", "rows in the middle"):
        tensor = LAYOUTS[name](5)
        packed = TensorForm.between(LAYOUTS[name](FEW), LAYOUTS[name](MORE)).pack(tensor, 5)
        assert packed.data_ptr() == tensor.data_ptr(), name


def test_conjugated_numbers_travel_as_what_they_are() -> None:
    """Conjugation is a flag beside the memory, and memory is what travels."""
    turned = torch.complex(torch.ones(3), torch.arange(3.0)).conj()
    for tensor in (turned, turned.imag):
        packed = TensorForm.between(tensor, tensor).pack(tensor, 3)
        assert not packed.is_conj()
        assert not packed.is_neg()
        assert torch.equal(packed, tensor)


def test_lasting_memory_is_copied_before_it_travels() -> None:
    """The next forward may write to a buffer while it is on its way."""
    buffer = torch.zeros(5)
    form = TensorForm.between(buffer, buffer)
    packed = form.pack(buffer, 7)
    buffer.add_(1)
    assert not packed.any()


def test_what_repeats_on_the_sample_only_keeps_its_numbers() -> None:
    form = TensorForm.between(LAYOUTS["repeated features"](FEW), LAYOUTS["repeated features"](MORE))
    tensor = torch.randn(5, 6)
    assert torch.equal(form.unpack(form.pack(tensor, 5), 5), tensor)


@given(st.data())
def test_any_layout_keeps_its_numbers(data: st.DataObject) -> None:
    """Any permutation, any gaps, at any number of rows, against a form that another layout may have set."""
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    axes = data.draw(st.permutations(range(len(shape) + 1)))
    steps = data.draw(st.lists(st.integers(1, 2), min_size=len(shape) + 1, max_size=len(shape) + 1))

    def make(rows: int) -> Tensor:
        sizes = [rows, *shape]
        base = torch.randn([sizes[a] * steps[i] for i, a in enumerate(axes)])
        sliced = base[tuple(slice(None, None, step) for step in steps)]
        return sliced.permute(sorted(range(len(axes)), key=axes.__getitem__))

    rows = data.draw(st.integers(1, 6))
    form = TensorForm.between(make(FEW), make(MORE))
    for tensor in (make(rows), torch.randn(rows, *shape)):
        arrived = form.unpack(form.pack(tensor, rows).clone(), rows)
        assert torch.equal(arrived, tensor)
    assert strides(form.unpack(form.pack(make(rows), rows), rows)) == strides(make(rows))


@dataclass
class Pair:
    """A dataclass that PyTorch's pytree knows once it is registered."""

    x: Tensor
    scale: float = 2.0


class Likes:
    """Its == says that everything is alike."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def test_unregistered_dataclass_gets_advice_that_works() -> None:
    with pytest.raises(ModelError, match=r"class Pair holds tensors \(x\).*torch.export.register_dataclass\(Pair\)"):
        observe("here", Pair(torch.ones(FEW, 2)), Pair(torch.ones(MORE, 2)))
    with pytest.raises(ModelError, match="class Pair holds tensors"):
        observe("here", same := Pair(torch.ones(2)), same)

    @dataclass
    class Registered:
        x: Tensor
        scale: float = 2.0

    torch.export.register_dataclass(Registered)
    contract = observe("here", Registered(torch.ones(FEW, 2)), Registered(torch.ones(MORE, 2)))
    value = contract.join(contract.split(Registered(torch.ones(5, 2)), 5), 5)
    assert isinstance(value, Registered) and value.x.shape == (5, 2) and value.scale == 2.0


def test_object_whose_equality_is_always_true_is_not_frozen_into_a_constant() -> None:
    with pytest.raises(ModelError, match="changes with the rows"):
        observe("here", (torch.ones(FEW), Likes(2)), (torch.ones(MORE), Likes(3)))
    contract = observe("here", (torch.ones(FEW), Likes(2)), (torch.ones(MORE), Likes(2)))
    with pytest.raises(ModelError, match="value that crosses this boundary"):
        contract.split((torch.ones(4), Likes(7)), 4)
