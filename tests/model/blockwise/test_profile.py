"""What blocks take at every share of a batch, measured without changing them. No test depends on how long anything takes."""

from itertools import count

import pytest
import torch
from support.blocks import Chain
from torch import nn

import pipestill as ps
from pipestill.costs import Link
from pipestill.model.blockwise import profile
from pipestill.model.blockwise.dry_run import blockwise_dry_run
from pipestill.model.blockwise.profile import measure_blocks
from pipestill.schedule.blockwise.profile import BlockProfile


def measured(task: ps.Blockwise) -> BlockProfile:
    inputs = torch.randn(3, 8)
    contracts = blockwise_dry_run(task, inputs)
    make = lambda parameters: torch.optim.SGD(parameters.values(), 0.1, momentum=0.9)  # noqa: E731
    return measure_blocks(task, contracts, inputs, batch=12, devices=3, optimizer=make, link=Link(1.0, 2.0))


def linears() -> Chain:
    return Chain([nn.Linear(8, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 8))])


def test_every_block_has_its_costs_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "now", count(1).__next__)  # a second a look at the clock
    task = ps.Blockwise(linears(), linears())
    before = [tensor.clone() for model in (task.teacher, task.student) for tensor in model.state_dict().values()]
    found = measured(task)
    after = [tensor for model in (task.teacher, task.student) for tensor in model.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in task.student.parameters())
    assert (found.batch, found.link) == (12, Link(1.0, 2.0))
    weights = (8 * 8 + 8) * 4
    for block, name in zip(found.blocks, ("b0", "b1"), strict=True):
        assert (block.name, block.rows) == (name, (4, 6, 12))
        assert block.teacher_seconds == block.student_seconds == (1, 1, 1)
        assert block.input_bytes_per_row == 8 * 4
        assert block.parameter_bytes == block.teacher_bytes == weights
        assert block.state_bytes == 3 * weights, "weights, gradients, momentum"
        assert block.activation_bytes_per_row > 0


@pytest.mark.parametrize(("seconds", "samples"), [([1.0], 5), ([1.0, 9.0], 40)])
def test_samples_end_when_their_error_is_small_or_there_are_enough(
    seconds: list[float], samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that work moves: by a second each time, or by one that jumps about. The first call is not counted."""
    times = [0.0]

    def work() -> None:
        times.append(times[-1] + seconds[len(times) % len(seconds)])

    monkeypatch.setattr(profile, "now", lambda: times[-1])
    average, error = profile._sampled(work)
    assert len(times) - 2 == samples
    assert (average, error) == (1.0, 0.0) if samples == 5 else error > 0.03
