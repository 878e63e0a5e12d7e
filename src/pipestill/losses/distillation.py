"""Losses of (student output, teacher output, target), for `ps.Distillation`, and of masked language models without a teacher."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pipestill.arguments import raise_problems, real_number
from pipestill.errors import ConfigError
from pipestill.losses.signatures import check_shapes


@dataclass(frozen=True)
class _Weighted:
    """A loss with a factor."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        raise_problems(real_number("weight", self.weight, least=0))


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


@dataclass(frozen=True)
class MaskedDistillation:
    """DistilBERT's loss of masked language models: the sum of three parts (Sanh et al. 2019, section 3).

    `soft_target` * T^2 * KL(teacher || student) of logits softened by temperature T, `cross_entropy` * the cross entropy
    with the masked tokens, and `cosine` * (1 - cosine similarity of the last hidden states). Each is the mean over rows of
    the weighted sum over tokens. With weights of rows / tokens, that is the mean over the batch's tokens, whatever
    microbatches the batch has. The defaults are those of DistilBERT's released training, which counts padding in none of
    the three.

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

    def __call__(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], target: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Compute the parts `soft_target`, `cross_entropy` and `cosine`.

        Args:
            student: the student's `logits`, (rows, length, vocabulary), and `last_hidden_state`, (rows, length, features).
            teacher: the teacher's, of the same shapes.
            target: `labels`, the ids of the original tokens, (rows, length), and two weights of that shape: `masked`, of
                each token in the cross entropy, and `tokens`, of each token in the other two parts.
        """
        check_shapes(student["logits"], teacher["logits"])
        parts, t = {}, self.temperature
        if self.soft_target:
            of_student, of_teacher = (F.log_softmax(output["logits"] / t, -1) for output in (student, teacher))
            divergence = F.kl_div(of_student, of_teacher, reduction="none", log_target=True).sum(-1)
            parts["soft_target"] = weighted_mean(divergence, target["tokens"]) * (self.soft_target * t * t)
        if self.cross_entropy:
            parts["cross_entropy"] = masked_cross_entropy(student, target)["cross_entropy"] * self.cross_entropy
        if self.cosine:
            student_states, teacher_states = student["last_hidden_state"], teacher["last_hidden_state"]
            check_shapes(student_states, teacher_states)
            distance = 1.0 - F.cosine_similarity(student_states, teacher_states, dim=-1)
            parts["cosine"] = weighted_mean(distance, target["tokens"]) * self.cosine
        return parts


def masked_cross_entropy(output: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the cross entropy with the masked tokens, the mean over rows of the weighted sum over tokens.

    Args:
        output: the model's `logits`, (rows, length, vocabulary).
        target: `labels`, (rows, length), and the weights `masked`, of that shape, as in `MaskedDistillation`.
    """
    logits = output["logits"]
    each = F.cross_entropy(logits.flatten(0, 1), target["labels"].flatten(), reduction="none")
    return {"cross_entropy": weighted_mean(each.view_as(target["masked"]), target["masked"])}


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The mean over rows of the weighted sum over tokens; both (rows, length)."""
    return (values * weights).sum(-1).mean()
