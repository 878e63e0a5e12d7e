"""Small recipes of both kinds, whose data and models take no time to make; processes import them by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pipestill as ps
from pipestill.recipes.blockwise import BlockwiseWorkload
from pipestill.recipes.distillation import DistillationWorkload
from pipestill.recipes.training import Training

ROWS, FEATURES = 16, 4
_TRAINING = Training(epochs=1, optimizer=torch.optim.SGD, lr=0.1)


def _loader(num_samples: int | None) -> DataLoader[tuple[Tensor, ...]]:
    """At most 72 samples, so that the last batch is short."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(num_samples or 72, FEATURES, generator=generator)
    return DataLoader(TensorDataset(rows, torch.randint(FEATURES, (len(rows),), generator=generator)), ROWS)


def _model(num_blocks: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(*(nn.Linear(FEATURES, FEATURES) for _ in range(num_blocks)))


@dataclass(frozen=True)
class Vectors:
    """Distils a chain of linear maps. With `forgetful`, its models are other ones every time: no run equals another."""

    name = "vectors"
    forgetful: bool = False

    def workload(self, seed: int, num_samples: int | None = None) -> DistillationWorkload:
        """Build models and data."""
        loader = _loader(num_samples)

        def student() -> nn.Sequential:
            return _model(3, int(torch.randint(2**31, ())) if self.forgetful else seed + 1)

        return DistillationWorkload(
            build_teacher=lambda: _model(3, seed),
            build_student=student,
            loss=ps.losses.SoftTarget(),
            supervised_loss=ps.losses.cross_entropy,
            metrics={},
            train_loader=loader,
            validation_loader=loader,
            teacher_training=_TRAINING,
            student_training=_TRAINING,
        )


@dataclass(frozen=True)
class Blocks:
    """Trains three linear maps, each alone."""

    name = "blocks"

    def workload(self, seed: int, num_samples: int | None = None) -> BlockwiseWorkload:
        """Build models and data."""
        loader: DataLoader[Any] = _loader(num_samples)
        return BlockwiseWorkload(
            build=lambda: ps.Blockwise(_model(3, seed), _model(3, seed + 1)),
            train_loader=loader,
            validation_loader=loader,
            supervised_loss=ps.losses.cross_entropy,
            metrics={},
            teacher_training=_TRAINING,
            student_training=_TRAINING,
            alone_training=_TRAINING,
        )
