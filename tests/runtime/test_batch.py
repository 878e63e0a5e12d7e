"""Batches and their microbatches."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipestill.runtime.batch import Batch, microbatch_rows


def sizes(rows: int, num_microbatches: int) -> list[int]:
    return [part.stop - part.start for part in microbatch_rows(rows, num_microbatches)]


def test_sizes_differ_by_at_most_one_and_the_last_are_empty() -> None:
    assert sizes(8, 4) == [2, 2, 2, 2]
    assert sizes(10, 4) == [3, 3, 2, 2]
    assert sizes(2, 4) == [1, 1, 0, 0]
    assert sizes(1, 1) == [1]


@given(st.integers(1, 200), st.integers(1, 50))
def test_every_row_is_in_one_microbatch(rows: int, num_microbatches: int) -> None:
    parts = microbatch_rows(rows, num_microbatches)
    assert [i for part in parts for i in range(rows)[part]] == list(range(rows))
    assert len(parts) == num_microbatches
    assert max(sizes(rows, num_microbatches)) - min(sizes(rows, num_microbatches)) <= 1
    assert sizes(rows, num_microbatches) == sorted(sizes(rows, num_microbatches), reverse=True)


def test_a_header_tells_everything_but_the_data() -> None:
    batch = Batch(7, 3, True, torch.zeros(7), torch.zeros(7))
    assert Batch.from_header(batch.header()) == Batch(7, 3, True)
    assert Batch.from_header(Batch(5, 0, False).header()) == Batch(5, 0, False)
