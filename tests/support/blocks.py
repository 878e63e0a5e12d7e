"""Blockwise tasks that tests and the processes they start train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pipestill as ps
from pipestill.costs import Link
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes

WIDTHS = (6, 8, 8, 10, 5)
ROWS, BATCHES, EPOCHS = 12, 5, 2  # and a last batch of 5 rows in every epoch

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {}),
    "rprop": (torch.optim.Rprop, {}),
}


class Chain(nn.Module):
    """Blocks named b0, b1, ... that an activation ends."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        for i, block in enumerate(blocks):
            self.add_module(f"b{i}", block)

    def pipeline_blocks(self) -> list[str]:
        return [name for name, _ in self.named_children()]

    def forward(self, x: Any) -> Any:
        for block in self.children():
            x = block(x)
        return x


def teacher() -> Chain:
    """With batch norm, whose statistics nobody may move, and an activation that writes to its input."""
    pairs = pairwise(WIDTHS)
    return Chain([
        nn.Sequential(nn.Linear(i, o), nn.BatchNorm1d(o), nn.Tanh(), nn.Linear(o, o)) for i, o in pairs
    ])  # fmt: skip


def student(kind: str) -> Chain:
    pairs = list(pairwise(WIDTHS))
    if kind == "norm":  # statistics of a batch, a dropout, and an input that the block writes to
        return Chain(
            [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(i, o), nn.BatchNorm1d(o), nn.Dropout(0.1)) for i, o in pairs]
        )
    if kind == "thin":
        return Chain([nn.Linear(4, 4) for _ in pairs])
    if kind == "frozen":  # a block with nothing to train, and one with a frozen layer
        blocks = [nn.Linear(i, o) for i, o in pairs]
        blocks[2].weight.requires_grad_(False)
        return Chain([blocks[0], nn.Tanh(), *blocks[2:]])
    return Chain([nn.Linear(i, o) for i, o in pairs])


@dataclass(frozen=True)
class BlockCase:
    """What is trained: `kind` of student, optimizer and number format."""

    kind: str = "plain"
    optimizer: str = "sgd"
    dtype: torch.dtype = torch.float64

    def task(self) -> ps.Blockwise:
        torch.manual_seed(0)
        taught, learner = teacher().to(self.dtype), student(self.kind).to(self.dtype)
        more: dict[str, Any] = {}
        if self.kind == "thin":
            more["output_projectors"] = {i: nn.Linear(4, WIDTHS[i + 1]).to(self.dtype) for i in range(4)}
            more["input_projectors"] = {i: nn.Linear(WIDTHS[i], 4).to(self.dtype) for i in range(4)}
        if self.kind == "library":
            more["candidates"] = {
                1: [nn.Linear(8, 8).to(self.dtype), nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8)).to(self.dtype)]
            }
        return ps.Blockwise(taught, learner, last_loss=ps.losses.SoftCrossEntropy(), **more)

    def run(self, strategy: str, devices: int, epochs: int = EPOCHS, steps: int | None = None, **knobs: Any) -> Outcome:
        task = self.task()
        optimizer, options = OPTIMIZERS[self.optimizer]
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(ROWS * BATCHES + 5, WIDTHS[0], generator=generator).to(self.dtype)
        loader = DataLoader(list(rows), batch_size=ROWS, shuffle=True)  # type: ignore[arg-type]
        trainer = ps.Trainer(
            task, optimizer=optimizer, optimizer_options=options, lr=0.01, devices=devices,
            strategy=strategy, device="cpu", log_every=4, timeout_seconds=60.0,
            **{"costs": profile_of(4), "lr_schedule": halved, **knobs},
        )  # fmt: skip
        result = trainer.fit(loader, epochs=epochs, steps=steps)
        beside = {f"{n}.{k}": t for i in range(4) for n, m in task.modules_of(i).items() for k, t in m.state_dict().items()}
        mine = {name: t.clone() for name, t in (task.student.state_dict() | beside).items()}
        return Outcome(mine, {name: t.clone() for name, t in task.teacher.state_dict().items()}, result)


def run_all(runs: Sequence[tuple[BlockCase, str]], devices: int) -> list[Outcome]:
    """Train cases one after the other, each by a strategy: a target for `launch`."""
    return [case.run(strategy, devices) for case, strategy in runs]


def halved(batch: int) -> float:
    return 0.5 ** (batch // 7)


@dataclass(frozen=True)
class Outcome:
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    result: ps.Result


def profile_of(num_blocks: int, fixed: float = 0.001, growth: int = 1) -> BlockProfile:
    """Later blocks take longer (with `growth`), so that loads are uneven; few rows are dear, so that blocks move instead of
    being shared.
    """
    lengths = [fixed * (i * growth + 1) for i in range(num_blocks)]
    blocks = [
        BlockTimes(f"b{i}", (1, ROWS), (fixed, 2 * fixed), (4 * length, 5 * length), 32, 100) for i, length in enumerate(lengths)
    ]
    return BlockProfile(tuple(blocks), Link())
