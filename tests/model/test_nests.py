"""Functions on nests of tensors."""

import pytest
import torch

from pipestill.errors import DataError
from pipestill.model.nests import copied, distinct_tensors, num_rows, rows_of


def test_num_rows() -> None:
    assert num_rows((torch.zeros(4, 2), [torch.zeros(4), "x"]), "batch") == 4
    for value in (torch.zeros(()), (torch.zeros(3), torch.zeros(4))):
        with pytest.raises(DataError, match="batch: every tensor's first axis must count the same samples"):
            num_rows(value, "batch")
    with pytest.raises(DataError, match=r"batch: expected tensors .*, got no tensor \(float, str\)"):
        num_rows(("no tensor", 1.0), "batch")
    with pytest.raises(DataError, match="batch: expected dense tensors"):
        num_rows(torch.eye(3).to_sparse(), "batch")


def test_rows_of_leaves_the_rest_alone() -> None:
    value = rows_of({"x": torch.arange(5), "y": ("name", torch.arange(10).view(5, 2))}, slice(1, 3))
    assert value["x"].tolist() == [1, 2]
    assert value["y"][0] == "name"
    assert value["y"][1].tolist() == [[2, 3], [4, 5]]
    assert rows_of(torch.arange(5), torch.tensor([4, 4])).tolist() == [4, 4]


def test_copies_share_nothing_but_what_was_the_same() -> None:
    x = torch.zeros(3)
    value = copied([x, x, {"y": x[1:]}])
    assert value[0] is value[1]
    assert len(distinct_tensors(value)) == 2
    x.fill_(1)
    assert not any(tensor.any() for tensor in distinct_tensors(value))
