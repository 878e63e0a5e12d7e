"""Batches in windows."""

from itertools import islice

import torch

from pipestill.runtime.batch import Batch
from pipestill.runtime.blockwise.windows import Window, header_length, windows


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


def test_a_header_tells_everything_but_the_samples() -> None:
    window = Window((5, 3, 0), 7, 2, True, inputs=(torch.zeros(5), torch.zeros(3)))
    assert len(window.header()) == header_length(3)
    assert Window.from_header(window.header()) == Window((5, 3, 0), 7, 2, True)
