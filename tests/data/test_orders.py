"""Orders follow from seed and epoch alone; rows are packed whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

import pipestill as ps

LENGTHS = [3 + (7 * i) % 41 for i in range(1003)]


def test_batches_are_of_similar_lengths_and_follow_seed_and_epoch() -> None:
    sampler = ps.data.LengthSampler(LENGTHS, batch_size=8, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        torch.rand(3)  # the global generator does not matter
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(len(LENGTHS)))
    batches = torch.tensor([LENGTHS[i] for i in orders[0]])[:1000].view(-1, 8)
    spread = (batches.max(-1).values - batches.min(-1).values).double().mean()
    assert spread < 2
    assert len({tuple(batch) for batch in batches.tolist()[:5]}) > 1
    other = ps.data.LengthSampler(LENGTHS, batch_size=8, seed=2)
    assert list(other) != orders[0]


def test_fewer_examples_than_a_batch_are_all_read() -> None:
    assert sorted(ps.data.LengthSampler([3, 1, 2], batch_size=8)) == [0, 1, 2]


def test_an_order_of_its_own() -> None:
    sampler = ps.data.ShuffledSampler(20, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert sorted(sampler) == list(range(20)) == sorted(first)


@given(st.lists(st.integers(1, 12), max_size=40))
def test_rows_hold_every_example_once_within_their_length(lengths: list[int]) -> None:
    rows = ps.data.pack(lengths, 12)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 12 for row in rows)
    assert len(rows) <= 2 * -(-sum(lengths) // 12)  # any two rows of a best fit are more than one full row


def test_little_room_is_left() -> None:
    rows = ps.data.pack([5, 3, 7, 1, 8, 4, 2, 6], 12)
    assert rows == [[0, 2], [1, 3, 6, 7], [4, 5]]


def test_an_example_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ps.UserError, match=r"2 examples are longer than a row of 4 tokens \(example 1 has 5\)"):
        ps.data.pack([3, 5, 6], 4)
