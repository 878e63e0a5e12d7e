"""What a rank holds in blockwise training is what the plan says."""

import pytest
import torch
from torch import nn

import pipestill as ps
from pipestill.model.measure import LiveBytes

ROWS, WIDTH = 512, 64


def models() -> ps.Blockwise:
    """A teacher block is two layers, a student block one; activations are far larger than weights."""
    torch.manual_seed(0)

    def layers(count: int) -> nn.Sequential:
        return nn.Sequential(*(module for _ in range(count) for module in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))

    return ps.Blockwise(*(nn.Sequential(*(Whole(*layers(count)) for _ in range(4))) for count in (2, 1)))


class Whole(nn.Sequential):
    """Layers that are one block."""


@pytest.mark.parametrize("strategy", ["dp", "relay-dpu"])
def test_prediction_is_what_is_counted(strategy: str) -> None:
    task, batch = models(), torch.randn(ROWS, WIDTH)
    options = {"optimizer_options": {"momentum": 0.9}, "lr": 0.01, "strategy": strategy, "device": "cpu"}
    trainer = ps.Trainer(task, costs=ps.Trainer(task, **options).measure([batch]), **options)
    (predicted,) = trainer.plan([batch]).memory_bytes
    weights = [*task.teacher.parameters(), *task.student.parameters()]
    with LiveBytes() as counted:
        trainer.fit([batch for _ in range(4)])
    held = counted.peak + sum(p.numel() * p.element_size() for p in weights)
    assert held <= predicted * 1.05, "what is refused by --memory is refused for good reason"
    assert held >= predicted * 0.8
