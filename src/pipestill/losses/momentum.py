"""Losses of (outputs of the student's views, outputs of the teacher's views, target), for `Momentum`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipestill.arguments import raise_problems, real_number
from pipestill.errors import ConfigError


def byol(student: Sequence[Tensor], teacher: Sequence[Tensor], target: object) -> dict[str, Tensor]:
    """Sum of 2 - 2 cosine(student's view i, teacher's view j) over all pairs of different views, the mean over rows.

    Outputs (rows, dim) a view (Grill et al. 2020, equation 2, in both directions).
    """
    pairs = [(s, t) for i, s in enumerate(student) for j, t in enumerate(teacher) if i != j]
    terms = [(2.0 - 2.0 * F.cosine_similarity(s, t, dim=-1)).mean() for s, t in pairs]
    return {"byol": torch.stack(terms).sum()}


@dataclass(frozen=True)
class InfoNCE:
    """2 T times the cross entropy of telling each sample's other view from those of all other samples, at temperature T.

    Outputs (rows, dim) a view; the negatives are the rest of what it is given, so use it with `batch_loss=True` (Chen et al.
    2021, MoCo v3, algorithm 1).
    """

    temperature: float = 0.2

    def __post_init__(self) -> None:
        raise_problems(real_number("temperature", self.temperature, above=0))

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], target: object) -> dict[str, Tensor]:
        t, terms = self.temperature, []
        for i, s in enumerate(student):
            for j, key in enumerate(teacher):
                if i != j:
                    logits = F.normalize(s, dim=-1) @ F.normalize(key, dim=-1).t() / t
                    terms.append(F.cross_entropy(logits, torch.arange(len(logits), device=logits.device)) * (2 * t))
        return {"info_nce": torch.stack(terms).sum()}


class Dino(nn.Module):
    """Cross entropy of the student's view i with the teacher's view j, the mean over all pairs of different views and rows.

    Outputs (rows, dim) a view. The teacher's are sharpened by a temperature that rises evenly from the first to the second of
    `teacher_temperatures` over `warm_up_batches`, once `center` is taken from them: their mean, moved by 1 -
    `center_momentum` towards that of each batch after its loss. So it is of batches: use it with `batch_loss=True`. Both
    the center and the number of batches are buffers (Caron et al. 2021, DINO, algorithm 1).
    """

    def __init__(
        self,
        dim: int,
        *,
        student_temperature: float = 0.1,
        teacher_temperatures: tuple[float, float] = (0.04, 0.07),
        warm_up_batches: int = 0,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if min(student_temperature, *teacher_temperatures) <= 0 or not 0 <= center_momentum < 1 or warm_up_batches < 0:
            raise ConfigError(
                f"student_temperature {student_temperature}, teacher_temperatures {teacher_temperatures}, center_momentum "
                f"{center_momentum} and warm_up_batches {warm_up_batches}; expected > 0, > 0, 0 to below 1, and >= 0"
            )
        self.student_temperature, self.teacher_temperatures = student_temperature, teacher_temperatures
        self.warm_up_batches, self.center_momentum = warm_up_batches, center_momentum
        self.register_buffer("center", torch.zeros(dim))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.center: Tensor
        self.batches: Tensor

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], target: object) -> dict[str, Tensor]:
        learnt = [F.log_softmax(view / self.student_temperature, -1) for view in student]
        with torch.no_grad():
            taught = [((view - self.center) / self.teacher_temperature()).softmax(-1) for view in teacher]
        terms = [-(t * s).sum(-1).mean() for j, t in enumerate(taught) for i, s in enumerate(learnt) if i != j]
        if self.training:
            with torch.no_grad():
                self.center.lerp_(torch.cat(list(teacher)).mean(0), 1.0 - self.center_momentum)
                self.batches.add_(1)
        return {"dino": torch.stack(terms).mean()}

    def teacher_temperature(self) -> Tensor:
        """Of the next batch."""
        first, last = self.teacher_temperatures
        done = (self.batches / max(1, self.warm_up_batches)).clamp(max=1.0) if self.warm_up_batches else 1.0
        return torch.as_tensor(first + (last - first) * done, device=self.center.device)
