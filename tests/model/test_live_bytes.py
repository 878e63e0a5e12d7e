"""Tensors count while they live, each storage once."""

import torch
from torch import nn

from pipestill.model.live_bytes import LiveBytes


def test_tensors_count_as_long_as_they_live() -> None:
    before = torch.ones(1000)
    with LiveBytes() as held:
        one = before + 1
        other = one.view(10, 100).t()  # a view is no memory
        assert held.now == 4000
        before.add_(1)
        del one
        assert held.now == 4000
        third = torch.zeros(500)
        assert held.now == held.peak == 6000
        del other
        assert (held.now, held.peak) == (2000, 6000)
        held.leave_out(third)
        held.leave_out(before)
    assert (held.now, held.peak) == (0, 6000)
    del third
    assert held.now == 0


def test_what_a_backward_holds_counts() -> None:
    """An activation and its gradient beside it, then the weight's gradient."""
    layer, x = nn.Linear(100, 100, bias=False), torch.ones(200, 100)
    with LiveBytes() as held:
        y = layer(x)
        loss = y.square().sum()
        assert held.now == 80_004  # the square is gone, what it was made from is kept
        loss.backward()
        del y, loss
        assert held.now == 40_000
    assert held.peak >= 2 * 80_000
