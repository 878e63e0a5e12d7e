"""Momentum tasks that a pipeline could get silently wrong, one peculiarity each. Built by name, so that processes can too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipestill as ps
from support.cases import SGD, Average
from support.fits import Case, Outcome, search_less
from support.models import Pool

WIDTH = 5
ROWS = (9, 9, 5, 2)
"""Uneven for 3 and 6 microbatches; the last batch leaves some of them empty."""


class Residual(nn.Module):
    """Its input is used twice, so that gradients add up inside a block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(F.gelu(self.norm(x)))


def encoder() -> list[nn.Module]:
    """(rows, 3, h, w) of any size -> (rows, WIDTH); dropout and batch norm, whose statistics each model has."""
    return [
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        Apart(nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        Apart(nn.Conv2d(6, 6, 3, padding=1), nn.Dropout2d(0.2), Pool()),
        Residual(6),
        nn.Linear(6, WIDTH),
    ]


class Apart(nn.Module):
    """Modules that are one block, which those of an `nn.Sequential` are not."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def predictor() -> nn.Module:
    return Apart(nn.Linear(WIDTH, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, WIDTH))


def cosine(student: Sequence[Tensor], teacher: Sequence[Tensor], target: Any) -> dict[str, Tensor]:
    """BYOL's: every view of the student against every other one of the teacher."""
    pairs = [(s, t) for i, s in enumerate(student) for j, t in enumerate(teacher) if i != j or len(student) == 1]
    return {"byol": sum((2 - 2 * F.cosine_similarity(s, t, dim=-1)).mean() for s, t in pairs)}


def info_nce(student: Sequence[Tensor], teacher: Sequence[Tensor], target: Any) -> dict[str, Tensor]:
    """MoCo v3's: of all samples' keys in the batch, each query's own is to be the closest."""
    loss: Any = 0.0
    for i, queries in enumerate(student):
        for j, keys in enumerate(teacher):
            if i != j:
                scores = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).t() / 0.2
                loss = loss + F.cross_entropy(scores, torch.arange(len(scores)))
    return {"nce": loss}


def momentum_task(
    blocks: Callable[[], list[nn.Module]] = encoder,
    loss: Any = cosine,
    change: Callable[[Any], Any] = lambda task: task,
    **rest: Any,
) -> Callable[[], ps.Momentum]:
    """A student with a predictor, and a teacher that starts as a copy of it. `change` is told the student."""

    def make() -> ps.Momentum:
        parts = blocks()
        student, teacher = nn.Sequential(*parts, predictor()), nn.Sequential(*copy.deepcopy(parts))
        change(student)
        return ps.Momentum(teacher, student, loss, **{"momentum": 0.9, **rest})

    return make


def images_in_views(*sizes: int, rows: Sequence[int] = ROWS) -> Callable[[], list[Any]]:
    """Batches of as many views as sizes, in pixels."""

    def batches() -> list[Any]:
        generator = torch.Generator().manual_seed(5)
        return [(tuple(torch.randn(n, 3, s, s, generator=generator) for s in sizes), None) for n in rows]

    return batches


def freeze_some(student: nn.Sequential) -> None:
    """The whole first block, and what is in the middle of another."""
    student[0].requires_grad_(False)
    student[3].norm.requires_grad_(False)


def with_average() -> list[nn.Module]:
    """Buffers that a forward replaces by new ones, and reads."""
    return [nn.Flatten(), nn.Linear(48, 8), Average(), nn.Tanh(), nn.Linear(8, WIDTH)]


TWO, THREE = images_in_views(4, 4), images_in_views(4, 4, 4)
ADAMW = {"optimizer": torch.optim.AdamW, "optimizer_options": {"weight_decay": 1e-2}}


def case(task: Callable[[], Any], loader: Callable[[], Any] = TWO, **trainer: Any) -> Case:
    return Case(task, loader, trainer={**SGD, **trainer})


MOMENTUM_CASES: dict[str, Case] = {
    "byol": case(momentum_task()),
    "info_nce": case(momentum_task(loss=info_nce, batch_loss=True)),
    "one_view": case(momentum_task(views=1), images_in_views(4)),
    "three_views_info_nce": case(momentum_task(views=3, loss=info_nce, batch_loss=True), THREE),
    "crops": case(momentum_task(views=3, teacher_views=2), images_in_views(6, 6, 3)),
    "crops_info_nce": case(momentum_task(views=3, teacher_views=1, loss=info_nce, batch_loss=True), images_in_views(6, 4, 3)),
    "adamw": case(momentum_task(), **ADAMW),
    "clipped_adamw_info_nce": case(momentum_task(loss=info_nce, batch_loss=True), clip_grad_norm=0.1, **ADAMW),
    "frozen": case(momentum_task(change=freeze_some), clip_grad_norm=0.05),
    "teacher_in_eval": case(momentum_task(teacher_mode="eval")),
    "copied_buffers": case(momentum_task(teacher_buffers="copy")),
    "copied_buffers_in_eval": case(momentum_task(teacher_mode="eval", teacher_buffers="copy")),
    "new_buffers": case(momentum_task(with_average)),
    "new_buffers_copied": case(momentum_task(with_average, teacher_buffers="copy")),
    "momentum_schedule": case(momentum_task(momentum=lambda step: 0.5 + step / 20), lr_schedule=lambda step: 1 / (1 + step)),
}


def run_momentum(runs: Sequence[tuple[str, str, dict[str, Any]]], devices: int) -> list[Outcome]:
    """Train cases one after the other, as `support.cases.run` does. A target for `launch`."""
    search_less()
    outcomes = []
    for name, strategy, trainer in runs:
        outcomes.append(MOMENTUM_CASES[name].run(strategy, devices, **trainer))
        outcomes[-1].student = None
    return outcomes
