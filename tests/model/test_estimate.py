"""Costs that are computed: the same bytes as those that are measured, and seconds that can be worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support.models import distillation, images
from torch import Tensor, nn

from pipestill import losses
from pipestill.errors import ConfigError
from pipestill.model.dry_run import dry_run
from pipestill.model.estimate import (
    DEVICES,
    LAUNCH_SECONDS,
    MATH_FRACTION,
    MEMORY_FRACTION,
    Machine,
    estimate,
    task_without_memory,
)
from pipestill.model.profile import profile
from pipestill.model.tasks import Distillation, Momentum, Supervised

A100 = Machine.parse("a100")


def adamw(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters.values())


def test_a_layer_takes_what_its_products_or_its_traffic_take() -> None:
    rows, width, classes = 4096, 2048, 1024

    def build() -> Supervised:
        return Supervised(nn.Sequential(nn.Linear(width, classes, bias=False)), losses.cross_entropy)

    task = task_without_memory(build, torch.float32)
    inputs, targets = torch.rand(2, width), torch.zeros(2, dtype=torch.long)
    costs = estimate(task, A100, inputs, targets, rows=rows, optimizer=adamw)
    a100 = DEVICES["a100"]
    products = 2 * rows * width * classes / (MATH_FRACTION * a100.flops["tf32"])
    traffic = 4 * (rows * width + width * classes + rows * classes) / (MEMORY_FRACTION * a100.bytes_per_second)
    assert products > traffic, "or the case is of no use"
    assert costs.student[0].forward_seconds == pytest.approx(products + LAUNCH_SECONDS)
    few = estimate(task, A100, inputs, targets, rows=2, optimizer=adamw)
    weights = 4 * (2 * width + width * classes + 2 * classes) / (MEMORY_FRACTION * a100.bytes_per_second)
    assert few.student[0].forward_seconds == pytest.approx(weights + LAUNCH_SECONDS), "few rows: reading the weights"
    assert costs.student[0].stash_bytes == 4 * rows * width
    assert costs.student[0].training_bytes == 3 * 4 * width * classes, "a gradient and AdamW's two averages"


def test_bytes_are_those_that_are_measured() -> None:
    x, y = images()[0]
    task = distillation()
    measured = profile(task, dry_run(task, x[:3], y[:3]), x, y, rows=6, optimizer=adamw, repeats=1)
    computed = estimate(task_without_memory(distillation, torch.float32), A100, x, y, rows=6, optimizer=adamw)
    for role in ("student", "teacher"):
        for one, other in zip(getattr(measured, role), getattr(computed, role), strict=True):
            for name in ("name", "parameter_bytes", "output_bytes", "stash_bytes"):
                assert getattr(one, name) == getattr(other, name), (one.name, name)
            steps = 4 * 16  # AdamW counts them in four bytes a parameter, which are not computed
            assert 0 <= one.training_bytes - other.training_bytes <= steps
    assert measured.source == "measured" and computed.source.startswith("computed for a100 (tf32")
    assert computed.know_memory and computed.link == A100.link
    assert all(0 <= b.weight_seconds <= b.backward_seconds for b in computed.student)
    assert any(0 < b.weight_seconds < b.backward_seconds for b in computed.student)


def test_half_the_precision_is_half_the_bytes_and_less_time() -> None:
    x, y = images()[0]
    one, half = (
        estimate(task_without_memory(distillation, m.dtype), m, x, y, rows=6, optimizer=adamw)
        for m in (A100, Machine.parse("a100:bf16"))
    )
    assert [b.output_bytes for b in one.student] == [2 * b.output_bytes for b in half.student]
    assert [b.parameter_bytes for b in one.teacher] == [2 * b.parameter_bytes for b in half.teacher]
    assert one.microbatch_seconds() > half.microbatch_seconds()


def test_no_weights_are_made() -> None:
    task = task_without_memory(lambda: _huge(), torch.float32)
    assert all(p.is_meta for model in (task.student, task.teacher) for p in model.parameters())


def _huge() -> Distillation:
    """Far more than any machine holds."""
    return Distillation(*(nn.Sequential(nn.Linear(10**7, 10**7)) for _ in range(2)), losses.SoftTarget())


class Attention(nn.Module):
    """Asks for a number, as models do that leave out masks which leave nothing out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 3 * 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).chunk(3, dim=-1)
        mask = x.sum(-1) > 0
        shown = None if mask.all() else mask[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        heads = [t.unflatten(-1, (4, 16)).transpose(1, 2) for t in (q, k, v)]
        return F.scaled_dot_product_attention(*heads, attn_mask=shown).transpose(1, 2).flatten(2)


def test_attention_keeps_no_matrix_and_questions_are_answered() -> None:
    length, rows = 512, 2

    def build() -> Supervised:
        model = nn.Sequential(Attention(), nn.Linear(64, 1))
        return Supervised(model, lambda output, target: (output.squeeze(-1) - target).square().mean())

    task = task_without_memory(build, torch.float32)
    inputs, targets = torch.rand(rows, length, 64), torch.rand(rows, length)
    costs = estimate(task, A100, inputs, targets, rows=rows, optimizer=adamw)
    matrix = 4 * rows * 4 * length * length
    mask = rows * length  # expanded over queries and heads as it is kept
    assert 0 < costs.student[0].stash_bytes < matrix + mask * 8
    assert costs.student[0].forward_seconds > 0


def test_a_momentum_teacher_moves_its_weights() -> None:
    def build() -> Momentum:
        teacher, student = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        return Momentum(teacher, student, losses.byol, views=2)

    task = task_without_memory(build, torch.float32)
    views = (torch.rand(4, 8), torch.rand(4, 8))
    costs = estimate(task, A100, views, None, rows=4, optimizer=adamw)
    assert costs.teacher[0].update_seconds > LAUNCH_SECONDS and len(costs.views) == 2


def test_the_optimizers_own_state_counts() -> None:
    x, y = images()[0]
    task = task_without_memory(distillation, torch.float32)

    def bytes_with(optimizer: object) -> list[int]:
        return [b.training_bytes for b in estimate(task, A100, x, y, rows=6, optimizer=optimizer).student]  # type: ignore[arg-type]

    weights = [b.parameter_bytes for b in estimate(task, A100, x, y, rows=6, optimizer=adamw).student]
    assert bytes_with(adamw) == [3 * size for size in weights]
    assert bytes_with(lambda p: torch.optim.SGD(p.values(), lr=0.1)) == weights
    assert bytes_with(lambda p: torch.optim.SGD(p.values(), lr=0.1, momentum=0.9)) == [2 * size for size in weights]


@pytest.mark.parametrize(
    ("text", "message"),
    [("a10", "no device 'a10' .did you mean 'a100'"), ("v100:bf16", "a v100 does not compute in bf16; there are fp32, fp16")],
)
def test_unknown_devices_and_precisions_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Machine.parse(text)


def test_faster_devices_take_less() -> None:
    x, y = images()[0]
    task = task_without_memory(distillation, torch.float32)
    seconds = [
        estimate(task, Machine.parse(name), x, y, rows=4096, optimizer=adamw).microbatch_seconds()
        for name in ("v100", "a100", "h100", "h200")
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert dataclasses.is_dataclass(A100)
