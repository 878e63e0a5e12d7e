"""Losses of (value after a student block, value after a teacher block, target), for `ps.features`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipestill.arguments import one_of, raise_problems, real_number
from pipestill.errors import ConfigError
from pipestill.losses.signatures import check_shapes
from pipestill.losses.targets import IGNORED, read_target, spread


@dataclass(frozen=True)
class _OfTokens(ABC):
    """A loss that is a mean over what a target counts: its `tokens`, else those with a label; over all rows without either."""

    @abstractmethod
    def each(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of each token or row, (rows, ...)."""

    def counts(self, target: Any) -> float | dict[str, float]:
        """Count the tokens (or rows) of a target; nothing where it does not tell.

        Args:
            target: as for a call.
        """
        weights = read_target(target, IGNORED).weights
        return {} if weights is None else float(weights.sum())

    def sums(self, student: Tensor, teacher: Tensor, target: Any) -> Tensor:
        """Compute the loss as a sum over what counts; as the mean over rows where the target does not tell.

        Args:
            student: as for a call.
            teacher: as for a call.
            target: as for a call.
        """
        each = self.each(student.float(), teacher.float())
        weights = read_target(target, IGNORED).weights
        if weights is None:
            return each.mean()
        return (each.reshape(-1) * spread(weights, each.shape, "the target's labels or weights").to(each.dtype)).sum()

    def __call__(self, student: Tensor, teacher: Tensor, target: Any) -> Tensor:
        """Compute the mean over what counts, 0 where nothing does.

        Args:
            student: the value after the student's block.
            teacher: the value after the teacher's block.
            target: labels, (rows, ...) or (rows,), of which those of -100 do not count; a dict with these as `labels` and
                perhaps with the weights of tokens as `tokens`; or anything else, for which all rows count.
        """
        counts = self.counts(target)
        total = self.sums(student, teacher, target)
        return total if isinstance(counts, dict) else total / max(counts, 1e-12)


@dataclass(frozen=True)
class Hint(_OfTokens):
    """The mean squared error of a student block's output from a teacher block's (FitNets, Romero et al. 2015, section 2.2).

    With `project=True` in `ps.features`, it is the loss of hidden states of TinyBERT (Jiao et al. 2020, equation 8) as well.

    Args:
        normalise: True divides both values by their norms along the last axis beforehand, so that only directions count.
    """

    normalise: bool = False

    def __post_init__(self) -> None:
        raise_problems(one_of("normalise", self.normalise, bool, "True or False"))

    def each(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of each token, the mean over the last axis.

        Args:
            student: (rows, ..., features).
            teacher: of the same shape.
        """
        check_shapes(student, teacher)
        if self.normalise:
            student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        return (student - teacher).square().mean(-1)


@dataclass(frozen=True)
class AttentionMaps(_OfTokens):
    """The mean squared error of attention maps (TinyBERT, Jiao et al. 2020, equation 7).

    Models with other numbers of heads are compared by the mean over heads.
    """

    def each(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of each query token, (rows, queries): the mean over heads and keys.

        Args:
            student: (rows, heads, queries, keys).
            teacher: the same, with any number of heads.
        """
        if student.dim() != 4 or teacher.dim() != 4:
            raise ValueError(f"attention maps are (rows, heads, queries, keys), got {(*student.shape,)} and {(*teacher.shape,)}")
        if student.shape[1] != teacher.shape[1]:
            student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
        check_shapes(student, teacher)
        return (student - teacher).square().mean(-1).mean(1)


@dataclass(frozen=True)
class AttentionTransfer(_OfTokens):
    """The squared difference of where two image models look (Zagoruyko and Komodakis 2017, section 3.1).

    Where a model looks is the mean over channels of |activation|^power, divided by its norm over places. Channels may differ in
    number, heights and widths may not.

    Args:
        power: the exponent, above 0.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        raise_problems(real_number("power", self.power, above=0))

    def each(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of each row, the mean over places.

        Args:
            student: (rows, channels, height, width).
            teacher: the same, with any number of channels.
        """
        maps = [F.normalize(value.abs().pow(self.power).mean(1).flatten(1), dim=1) for value in (student, teacher)]
        check_shapes(*maps)
        return (maps[0] - maps[1]).square().mean(1)


@dataclass(frozen=True)
class RKD:
    """Relations between samples: distances of pairs and angles of triples (Park et al. 2019, equations 5 to 8).

    Samples are compared with each other, so use it with `ps.Distillation(..., batch_loss=True)`: for features, or as the loss of
    the outputs. Widths may differ.

    Args:
        distance: the factor of the part `distance`, at least 0; a part with factor 0 is left out.
        angle: the factor of the part `angle`, likewise. It takes memory that grows with the cube of the batch's rows.
    """

    distance: float = 25.0
    angle: float = 50.0

    def __post_init__(self) -> None:
        raise_problems((*real_number("distance", self.distance, least=0), *real_number("angle", self.angle, least=0)))
        if not self.distance and not self.angle:
            raise ConfigError("distance and angle are both 0; expected one above 0")

    def __call__(self, student: Tensor, teacher: Tensor, target: object) -> dict[str, Tensor]:
        """Compute the parts `distance` and `angle`.

        Args:
            student: the student's values, (rows, ...), at least 2 rows.
            teacher: the teacher's, (rows, ...).
            target: not read.
        """
        if len(student) != len(teacher) or len(student) < 2:
            raise ValueError(
                f"{len(student)} rows of the student and {len(teacher)} of the teacher; expected as many, at least 2"
            )
        values = [value.float().flatten(1) for value in (student, teacher)]
        parts = {}
        if self.distance:
            ours, theirs = map(_distances, values)
            parts["distance"] = F.smooth_l1_loss(ours, theirs) * self.distance
        if self.angle:
            ours, theirs = map(_cosines, values)
            parts["angle"] = F.smooth_l1_loss(ours, theirs) * self.angle
        return parts


def _distances(value: Tensor) -> Tensor:
    """The distances of all pairs of rows, divided by their mean."""
    distances = torch.pdist(value)
    return distances / distances.mean().clamp_min(torch.finfo(value.dtype).tiny)


def _cosines(value: Tensor) -> Tensor:
    """The cosines of the angles at each row between any two rows, (rows, rows, rows)."""
    directions = F.normalize(value.unsqueeze(0) - value.unsqueeze(1), dim=2)
    return directions @ directions.transpose(1, 2)
