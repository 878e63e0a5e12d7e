"""Stopwatches by a clock that the test moves, optimizers that change no model, and living tensors, each storage once."""

import pytest
import torch
from torch import nn

from pipestill.model import measure
from pipestill.model.measure import LiveBytes, Stopwatch, state_bytes, trial_optimizer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock of one number."""
    time = [0.0]
    monkeypatch.setattr(measure, "now", lambda: time[0])
    return time


def test_a_stopwatch_notes_the_seconds_of_every_piece(clock: list[float]) -> None:
    watch = Stopwatch()
    for seconds, piece in ((1.0, "one"), (2.0, "two"), (4.0, "one")):
        clock[0] += seconds
        watch.mark(piece, 3)
    assert watch.seconds == {("one", 3): [1.0, 4.0], ("two", 3): [2.0]}


def test_a_trial_optimizer_changes_no_model() -> None:
    layer = nn.Linear(3, 2)
    before = [parameter.clone() for parameter in layer.parameters()]
    optimizer = trial_optimizer(dict(layer.named_parameters()), lambda p: torch.optim.SGD(p.values(), 0.1, momentum=0.9))
    assert optimizer is not None
    optimizer.step()
    assert state_bytes(optimizer) == (3 * 2 + 2) * 4
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert trial_optimizer({}, lambda p: torch.optim.SGD(p.values(), 0.1)) is None


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
