"""Batches, their microbatches, and windows of them."""

from itertools import islice

import torch
from hypothesis import given, strategies as st

from pipestill.runtime.batch import Batch, Window, header_length, microbatch_rows, windows


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


def batch(rows: int, last: bool = False, epoch: int = 0) -> Batch:
    return Batch(rows, epoch, last, torch.full((rows, 1), float(rows)))


def test_windows_end_with_an_epoch_and_then_for_ever() -> None:
    source = [batch(4), batch(4), batch(3, last=True), batch(4, epoch=1), batch(2, last=True, epoch=1)]
    first, second, third, *rest = islice(windows(iter(source), 2), 6)
    assert (first.rows, first.first, first.last) == ((4, 4), 0, False)
    assert (second.rows, second.first, second.last) == ((3, 0), 2, True)
    assert (third.rows, third.first, third.epoch, third.last) == ((4, 2), 3, 1, True)
    assert [window.ended for window in (first, second, third)] == [False] * 3
    assert [window.ended for window in rest] == [True] * 3
    assert [window.num_batches for window in (first, second, *rest)] == [2, 1, 0, 0, 0]
    assert second.inputs is not None
    assert len(second.inputs) == 1


def test_a_header_of_a_window_tells_everything_but_the_samples() -> None:
    window = Window((5, 3, 0), 7, 2, True, inputs=(torch.zeros(5), torch.zeros(3)))
    assert len(window.header()) == header_length(3)
    assert Window.from_header(window.header()) == Window((5, 3, 0), 7, 2, True)
