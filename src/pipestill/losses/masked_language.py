"""The loss, the loss without a teacher, and the metric of masked language models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pipestill.arguments import raise_problems, real_number
from pipestill.errors import ConfigError
from pipestill.losses.signatures import check_shapes


@dataclass(frozen=True)
class MaskedDistillation:
    """Of masked language models: `soft_target` * T^2 * KL(teacher || student) of logits softened by temperature T, +
    `cross_entropy` with the masked tokens + `cosine` * (1 - cosine similarity of the last hidden states).

    Outputs are dicts of `logits` (rows, length, vocabulary) and `last_hidden_state` (rows, length, features). The target is
    a dict of `labels` (rows, length) and of two weights of the same shape: `masked`, of each token in the cross entropy, and
    `tokens`, in the other two. Each part is the mean over rows of the weighted sum over tokens: with weights of rows /
    tokens, the mean over the batch's tokens, however the batch is cut (Sanh et al. 2019, DistilBERT, section 3; weights 5, 2
    and 1 and T 2 as in its released training, which counts padding in none of the three).
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
        hidden, taught = student["last_hidden_state"], teacher["last_hidden_state"]
        check_shapes(student["logits"], teacher["logits"])
        parts, t = {}, self.temperature
        if self.soft_target:
            ours, theirs = (F.log_softmax(output["logits"] / t, -1) for output in (student, teacher))
            divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
            parts["soft_target"] = _weighted(divergence, target["tokens"]) * (self.soft_target * t * t)
        if self.cross_entropy:
            parts["cross_entropy"] = masked_cross_entropy(student, target)["cross_entropy"] * self.cross_entropy
        if self.cosine:
            check_shapes(hidden, taught)
            apart = 1.0 - F.cosine_similarity(hidden, taught, dim=-1)
            parts["cosine"] = _weighted(apart, target["tokens"]) * self.cosine
        return parts


def masked_cross_entropy(output: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cross entropy of `logits` with the masked tokens: outputs and targets as in `MaskedDistillation`."""
    logits = output["logits"]
    each = F.cross_entropy(logits.flatten(0, 1), target["labels"].flatten(), reduction="none")
    return {"cross_entropy": _weighted(each.view_as(target["masked"]), target["masked"])}


def masked_accuracy(output: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
    """Share of the masked tokens whose largest logit is theirs: outputs and targets as in `MaskedDistillation`."""
    right = output["logits"].argmax(-1) == target["labels"]
    return _weighted(right.double(), target["masked"])


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """The mean over rows of the weighted sum of values (rows, length)."""
    return (values * weights).sum(-1).mean()
