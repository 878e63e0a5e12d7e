"""The loss against a teacher's largest logits that a cache has kept: the teacher itself is not there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipestill.errors import DataError, ModelError
from pipestill.losses.divergences import Divergence, cached_top_k_kl
from pipestill.losses.logit_losses import LogitLoss
from pipestill.losses.logits import Logits

_NAMES = ("teacher_values", "teacher_ids", "teacher_tail", "teacher_facts")


@dataclass(frozen=True)
class CachedTopK(LogitLoss):
    """KL(teacher || student) over the words that a teacher cache holds and all others as one, the part `top_k_kl`.

    It is the loss that `TopKKL` gives with the teacher at hand, for `ps.Supervised`. The targets hold what the teacher said, as
    `ps.cache.TeacherCache.attach` gives them.

    Args:
        temperature: T, above 0, by which the logits of both models are divided for the divergence; that of `attach`.
        weight: the factor of the divergence, at least 0.
    """

    part = "top_k_kl"
    temperature: float = 1.0
    weight: float = 1.0

    def divergence(self) -> Divergence:
        """The divergence from what is kept of a teacher."""
        return cached_top_k_kl

    def counts(self, target: Any) -> dict[str, float]:
        """How much a target counts for, by part of the loss.

        Args:
            target: a mapping with `labels`, perhaps `tokens`, and what a teacher cache attaches.

        Raises:
            DataError: that is not there, or is for another temperature.
        """
        self._check(target)
        return super().counts(target)

    def sums(self, output: Any, target: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Compute the parts as sums of weight x value over the tokens given.

        Args:
            output: the student's logits, (rows, ..., vocabulary), or a mapping with `logits`; or either as a
                `ps.losses.LinearLogits`.
            target: as `counts` takes it.
        """
        return super().sums(output, self._packed(target), target)

    def __call__(self, output: Any, target: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Compute the parts as means over what counts of the tokens given; 0 where nothing does.

        Args:
            output: the student's logits, (rows, ..., vocabulary), or a mapping with `logits`; or either as a
                `ps.losses.LinearLogits`.
            target: as `counts` takes it.
        """
        return super().__call__(output, self._packed(target), target)

    def _packed(self, target: Any) -> Tensor:
        """What is kept of the teacher, as one tensor (rows, ..., 2k + 3): values, ids, the tail, and the facts."""
        self._check(target)
        values, ids, tail, facts = (target[name].double() for name in _NAMES)
        return torch.cat([values, ids, tail.unsqueeze(-1), facts], -1)

    @property
    def _teacher_width(self) -> int | None:
        return 2**31  # all columns there are

    def _vocabulary(self, student: Logits, teacher: Logits) -> int:
        """How many of the student's logits are read: as many as the teacher had."""
        assert isinstance(teacher, Tensor)
        if student.shape[:-1] != teacher.shape[:-1]:
            raise ModelError(
                f"the student's logits are {tuple(student.shape)} and what the cache holds is of {tuple(teacher.shape[:-1])} "
                "tokens; expected the same axes before the last"
            )
        needed = int(teacher[..., -1].max()) if teacher.numel() else 0
        found = self.vocabulary or student.shape[-1]
        if needed not in (0, found) or found > student.shape[-1]:
            raise ModelError(
                f"the teacher cache is of {needed} logits, and of the student's {student.shape[-1]} are read {found}; "
                + (
                    f"where one tokenizer's words are padded differently, give the loss vocabulary={needed}"
                    if needed <= student.shape[-1]
                    else f"write the cache with vocabulary={student.shape[-1]}, or len(tokenizer) if that is less"
                )
            )
        return found

    def _check(self, target: Any) -> None:
        """Refuse targets without what the cache kept, or for another temperature."""
        missing = [name for name in _NAMES if not isinstance(target, Mapping) or not isinstance(target.get(name), Tensor)]
        if missing:
            raise DataError(
                f"the targets lack {', '.join(missing)}; give the loader ps.cache.TeacherCache(folder).attach(dataset) in "
                "place of its data set"
            )
        facts = target["teacher_facts"]
        if facts.is_cuda:
            return  # the reader has looked at them where they were on the CPU
        wrong = facts[..., 0][(facts[..., 0] != 0) & (facts[..., 0] != torch.tensor(self.temperature, dtype=facts.dtype))]
        if wrong.numel():
            raise DataError(
                f"the teacher cache was attached for temperature {float(wrong[0]):g}, and the loss has {self.temperature:g}; "
                f"give attach(dataset, temperature={self.temperature:g})"
            )
