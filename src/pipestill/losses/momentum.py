"""Losses of (student outputs, teacher outputs, target), with one output a view, for `ps.Momentum`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipestill.arguments import hinted, raise_problems, real_number
from pipestill.errors import ConfigError


def byol(student: Sequence[Tensor], teacher: Sequence[Tensor], target: object) -> dict[str, Tensor]:
    """Compute BYOL's loss: the sum of 2 - 2 cosine(student's view i, teacher's view j) over all i other than j.

    The mean over rows (Grill et al. 2020, equation 2, in both directions as in section 3.1).

    Args:
        student: the student's predictions, (rows, features) a view.
        teacher: the teacher's projections, likewise.
        target: not read.
    """
    pairs = [(s, t) for i, s in enumerate(student) for j, t in enumerate(teacher) if i != j]
    terms = [(2.0 - 2.0 * F.cosine_similarity(s, t, dim=-1)).mean() for s, t in pairs]
    return {"byol": torch.stack(terms).sum()}


@hinted
@dataclass(frozen=True)
class InfoNCE:
    """MoCo v3's loss: 2 T times the cross entropy of telling each sample's other view from those of all other samples.

    The other rows that it gets are the negatives, so use it with `ps.Momentum(..., batch_loss=True)` (Chen et al. 2021,
    algorithm 1).

    Args:
        temperature: T, above 0, by which the cosine similarities are divided.
    """

    temperature: float = 0.2

    def __post_init__(self) -> None:
        raise_problems(real_number("temperature", self.temperature, above=0))

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], target: object) -> dict[str, Tensor]:
        """Compute the part `info_nce`: the sum over all pairs of different views, the mean over rows.

        Args:
            student: the student's predictions, (rows, features) a view.
            teacher: the teacher's projections, likewise.
            target: not read.
        """
        t, terms = self.temperature, []
        for i, s in enumerate(student):
            for j, key in enumerate(teacher):
                if i != j:
                    logits = F.normalize(s, dim=-1) @ F.normalize(key, dim=-1).t() / t
                    terms.append(F.cross_entropy(logits, torch.arange(len(logits), device=logits.device)) * (2 * t))
        return {"info_nce": torch.stack(terms).sum()}


@hinted
class Dino(nn.Module):
    """DINO's loss: the cross entropy of the student's view i with the teacher's view j (Caron et al. 2021, section 3.1).

    The mean over all pairs of different views, and over rows. The teacher's outputs are centred by a moving average of
    their mean, then sharpened by a low temperature. That average is one of whole batches, so use the loss with
    `ps.Momentum(..., batch_loss=True)`. It and the number of batches are buffers (algorithm 1 and equation 4 of the paper).

    Args:
        dim: the number of features of an output.
        student_temperature: above 0; the student's outputs are divided by it.
        teacher_temperatures: the first and the last temperature of the teacher's outputs, both above 0.
        warm_up_batches: the number of batches over which the teacher's temperature rises evenly from first to last; 0
            takes the last one from the start.
        center_momentum: at least 0 and less than 1; the average moves by 1 - this towards the mean of each batch.
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
        self.student_temperature = student_temperature
        self.teacher_temperatures = teacher_temperatures
        self.warm_up_batches = warm_up_batches
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(dim))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.center: Tensor
        self.batches: Tensor

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], target: object) -> dict[str, Tensor]:
        """Compute the part `dino`; in train mode, also move the center and count the batch.

        Args:
            student: the student's outputs, (rows, dim) a view.
            teacher: the teacher's outputs, likewise.
            target: not read.
        """
        log_student = [F.log_softmax(view / self.student_temperature, -1) for view in student]
        with torch.no_grad():
            probabilities = [((view - self.center) / self.teacher_temperature()).softmax(-1) for view in teacher]
        pairs = [(t, s) for j, t in enumerate(probabilities) for i, s in enumerate(log_student) if i != j]
        terms = [-(t * s).sum(-1).mean() for t, s in pairs]
        if self.training:
            with torch.no_grad():
                self.center.lerp_(torch.cat(list(teacher)).mean(0), 1.0 - self.center_momentum)
                self.batches.add_(1)
        return {"dino": torch.stack(terms).mean()}

    def teacher_temperature(self) -> Tensor:
        """The temperature of the teacher's outputs in the next batch, a scalar."""
        first, last = self.teacher_temperatures
        done = (self.batches / max(1, self.warm_up_batches)).clamp(max=1.0) if self.warm_up_batches else 1.0
        return torch.as_tensor(first + (last - first) * done, device=self.center.device)
