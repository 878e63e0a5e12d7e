"""Losses of (student output, teacher output, target), for `ps.Distillation`, beside those of logits."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipestill.arguments import hinted, raise_problems, real_number
from pipestill.errors import ConfigError
from pipestill.losses.counted import means
from pipestill.losses.logit_losses import SoftTarget
from pipestill.losses.signatures import LossValue, check_shapes
from pipestill.losses.supervised import CrossEntropy
from pipestill.losses.targets import IGNORED, labels_of


@dataclass(frozen=True)
class _Weighted:
    """A loss with a factor."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        raise_problems(real_number("weight", self.weight, least=0))


@hinted
@dataclass(frozen=True)
class Cosine(_Weighted):
    """The mean of 1 - cosine similarity of the two models' features.

    Args:
        weight: the factor of the loss, at least 0.
    """

    def __call__(self, student: Tensor, teacher: Tensor, target: object) -> dict[str, Tensor]:
        """Compute the part `cosine`.

        Args:
            student: the student's output, (..., features); the similarity is that of the last axis.
            teacher: the teacher's output, of the same shape.
            target: not read.
        """
        check_shapes(student, teacher)
        return {"cosine": (1.0 - F.cosine_similarity(student, teacher, dim=-1)).mean() * self.weight}


@hinted
@dataclass(frozen=True)
class MaskedDistillation:
    """DistilBERT's loss of masked language models: the sum of three parts (Sanh et al. 2019, section 3).

    `soft_target` * T^2 * KL(teacher || student) of logits softened by temperature T, `cross_entropy` * the cross entropy
    with the masked tokens, and `cosine` * (1 - cosine similarity of the last hidden states). The cross entropy is the mean over
    the masked tokens of a batch, the other two are means over all of its tokens. The defaults are those of DistilBERT's released
    training, which counts padding in none of the three.

    Args:
        temperature: T, above 0, by which the logits of both models are divided.
        soft_target: the factor of the divergence, at least 0; a part with factor 0 is left out.
        cross_entropy: the factor of the cross entropy, likewise.
        cosine: the factor of the cosine distance, likewise.
    """

    temperature: float = 2.0
    soft_target: float = 5.0
    cross_entropy: float = 2.0
    cosine: float = 1.0

    def __post_init__(self) -> None:
        weights = (self.soft_target, self.cross_entropy, self.cosine)
        raise_problems(p for name, value in vars(self).items() for p in real_number(name, value))
        if self.temperature <= 0 or min(weights) < 0 or max(weights) == 0:
            raise ConfigError(
                f"temperature {self.temperature} and weights {weights}; expected > 0, and weights >= 0 that are not all 0"
            )

    def counts(self, target: Mapping[str, Tensor]) -> dict[str, float]:
        """Count the masked tokens, and all tokens.

        Args:
            target: as for a call.
        """
        tokens, masked = float(target["tokens"].sum()), labels_of(target, IGNORED).counted.sum()
        counts = {"soft_target": tokens, "cross_entropy": float(masked), "cosine": tokens}
        return {name: count for name, count in counts.items() if getattr(self, name)}

    def sums(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], target: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Compute the three parts as sums over tokens.

        Args:
            student: as for a call.
            teacher: as for a call.
            target: as for a call.
        """
        parts: dict[str, Tensor] = {}
        if self.soft_target:
            loss = SoftTarget(self.temperature, self.soft_target, cross_entropy=self.cross_entropy, ignore_index=IGNORED)
            parts |= loss.sums(student, teacher, target)
        elif self.cross_entropy:
            part = CrossEntropy(IGNORED).sums(student, target)["cross_entropy"]
            parts["cross_entropy"] = part * self.cross_entropy
        if self.cosine:
            student_states, teacher_states = student["last_hidden_state"], teacher["last_hidden_state"]
            check_shapes(student_states, teacher_states)
            distance = 1.0 - F.cosine_similarity(student_states.float(), teacher_states.float(), dim=-1)
            parts["cosine"] = torch.where(target["tokens"] > 0, distance * target["tokens"], 0.0).sum() * self.cosine
        return parts

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> LossValue:
        """Compute the parts `soft_target`, `cross_entropy` and `cosine` as means over what counts.

        Args:
            student: the student's `logits`, (rows, length, vocabulary), and `last_hidden_state`, (rows, length, features).
            teacher: the teacher's, of the same shapes.
            target: `labels`, the ids of the masked tokens and -100 elsewhere, (rows, length), and `tokens`, of that shape: 1 for
                each token, and 0 for padding.
        """
        return means(self.sums(student, teacher, target), self.counts(target))
