"""Losses of two models' logits, with a cross entropy mixed in: for classes, (rows, classes), and words, (rows, length, words)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipestill.arguments import hinted, one_of, raise_problems, real_number, whole
from pipestill.errors import ConfigError, DataError
from pipestill.losses import divergences
from pipestill.losses.chunks import Work, sums_of
from pipestill.losses.divergences import Divergence
from pipestill.losses.logits import Logits, logits_of
from pipestill.losses.targets import Labels, Target, checked_labels, read_target, spread


@dataclass(frozen=True)
class LogitLoss(ABC):
    """A divergence of two models' logits plus a cross entropy with labels; the base of the losses that ship.

    The divergence is the mean over the tokens that count, times its weight and T^2; the cross entropy is the mean over the
    labels that count. A token counts where its label is not `ignore_index`, or as much as the target's `tokens` says. All
    of a batch counts together (see `counts`), however it is divided into microbatches. Values are computed in float64 from
    logits of any type, a chunk of tokens at a time.
    """

    _: KW_ONLY
    cross_entropy: float = 0.0
    """The factor of the cross entropy with the labels, at least 0; 0 leaves it out."""
    kd_ratio: float | None = None
    """In place of both factors, a number from 0 to 1: the divergence weighs that, the cross entropy the rest."""
    squared: bool = True
    """Whether the divergence is multiplied by T^2, so that its gradients stay alike whatever T (Hinton et al. 2015)."""
    ignore_index: int = -100
    """The label of tokens that do not count."""
    vocabulary: int | None = None
    """How many of each model's logits are compared, the first ones; for models that pad one tokenizer's words differently."""
    chunk_size: int | None = None
    """How many tokens are worked on at a time (default: what suits the device)."""

    part: ClassVar[str]
    """The name of the divergence's part."""
    takes_linear_logits: ClassVar[bool] = True
    """That it takes `LinearLogits` for logits, which `ps.Distillation(..., fuse_heads=True)` asks of a loss."""

    def __post_init__(self) -> None:
        temperature, weight = self._own
        problems = [
            *real_number("temperature", temperature, above=0),
            *real_number("weight", weight, least=0),
            *real_number("cross_entropy", self.cross_entropy, least=0),
            *(() if self.kd_ratio is None else real_number("kd_ratio", self.kd_ratio, least=0, most=1)),
            *one_of("squared", self.squared, bool, "True or False"),
            *whole("ignore_index", self.ignore_index),
            *(() if self.vocabulary is None else whole("vocabulary", self.vocabulary, 1)),
            *(() if self.chunk_size is None else whole("chunk_size", self.chunk_size, 1)),
        ]
        given = {field.name: field.default for field in fields(self) if field.name in ("weight", "cross_entropy")}
        if self.kd_ratio is not None and any(getattr(self, name) != default for name, default in given.items()):
            problems.append("kd_ratio stands for weight and cross_entropy; give it, or them")
        raise_problems(problems)

    @abstractmethod
    def divergence(self) -> Divergence:
        """The function that compares logits."""

    @property
    def _own(self) -> tuple[float, float]:
        """The temperature and the weight: positional fields of each loss, in an order of its own, where it has them."""
        return getattr(self, "temperature", 1.0), getattr(self, "weight", 1.0)

    @property
    def factors(self) -> tuple[float, float]:
        """The factors of the divergence (without T^2) and of the cross entropy."""
        return (self._own[1], self.cross_entropy) if self.kd_ratio is None else (self.kd_ratio, 1.0 - self.kd_ratio)

    def counts(self, target: Any) -> dict[str, float]:
        """How much a target counts for, by part of the loss; empty where it says nothing of tokens.

        Args:
            target: class indices, (rows, ...), or a mapping with `labels` and perhaps `tokens`, weights of the same shape.
        """
        return self._counts(self._read(target))

    def _read(self, target: Any) -> Target:
        """What a target says of tokens; `DataError` where it cannot have the labels that the loss needs."""
        read = read_target(target, self.ignore_index)
        if isinstance(target, Mapping) and (read.weights is None or (read.labels is None and self.factors[1])):
            needed = "'labels'" if self.factors[1] else "'labels' or 'tokens'"
            raise DataError(
                f"the target is a mapping of {', '.join(map(repr, target))}; expected one with {needed}"
                f"{', or a loss with cross_entropy=0' if read.weights is not None else ''}"
            )
        if read.labels is None and isinstance(target, Tensor) and self.factors[1]:
            raise DataError(
                f"the target is {target.dtype} {tuple(target.shape)}; expected class indices, whole numbers of (rows, ...), or a "
                "loss with cross_entropy=0"
            )
        return read

    def _counts(self, target: Target) -> dict[str, float]:
        if target.weights is None:
            return {}
        counts = {self.part: float(target.weights.sum())}
        if target.counted is not None and self.factors[1]:
            counts["cross_entropy"] = float(target.counted.sum())
        return counts

    def sums(self, student: Any, teacher: Any, target: Any) -> dict[str, Tensor]:
        """Compute the parts as sums of weight x value over the tokens given; as means where the target says nothing of them.

        Args:
            student: the student's logits, (rows, ..., vocabulary), or a mapping with `logits`; or either as a
                `ps.losses.LinearLogits`.
            teacher: the teacher's, of the same shape.
            target: as `counts` takes it, or None for the divergence alone.
        """
        read = self._read(target)
        return self._parts(student, teacher, read, {} if read.weights is not None else None)

    def __call__(self, student: Any, teacher: Any, target: Any) -> dict[str, Tensor]:
        """Compute the parts as means over what counts of the tokens given; 0 where nothing does.

        Args:
            student: the student's logits, (rows, ..., vocabulary), or a mapping with `logits`; or either as a
                `ps.losses.LinearLogits`.
            teacher: the teacher's, of the same shape.
            target: as `counts` takes it, or None for the divergence alone.
        """
        read = self._read(target)
        return self._parts(student, teacher, read, self._counts(read) or None)

    def _parts(self, student: Any, teacher: Any, target: Target, counts: Mapping[str, float] | None) -> dict[str, Tensor]:
        """The parts, each divided by its count where `counts` has one; None: means over all tokens."""
        of_student, of_teacher = logits_of(student), logits_of(teacher)
        lead, vocabulary = of_student.shape[:-1], self._vocabulary(of_student, of_teacher)
        device = (of_student if isinstance(of_student, Tensor) else of_student.hidden).device
        weight, label_weight = self.factors
        with_labels = target.labels is not None and label_weight > 0.0
        if target.weights is None:
            counts = {self.part: lead.numel()}
            weights = torch.ones(lead.numel(), dtype=torch.float64, device=device)
        else:
            weights = spread(target.weights.to(device), lead, "the target's labels")
        labels, label_weights = (
            self._labels(target, lead, vocabulary, device) if with_labels else (None, torch.zeros_like(weights))
        )
        temperature = self._own[0]
        scale = temperature**2 if self.squared else 1.0
        work = Work(
            self.divergence(), temperature, weights, _over(weight * scale, counts, self.part),
            labels, label_weights, _over(label_weight, counts, "cross_entropy"), vocabulary, self.chunk_size, self._teacher_width,
        )  # fmt: skip
        divergence, label_sum = sums_of(work, of_student, of_teacher)
        return {self.part: divergence, "cross_entropy": label_sum} if with_labels else {self.part: divergence}

    @property
    def _teacher_width(self) -> int | None:
        """How many columns the divergence reads of a teacher; None for the vocabulary's."""
        return None

    def _vocabulary(self, student: Logits, teacher: Logits) -> int:
        """How many logits are compared; `ConfigError` where the two models' shapes do not allow it."""
        ours, theirs = student.shape, teacher.shape
        if ours[:-1] == theirs[:-1] and self.vocabulary is not None:
            if self.vocabulary > min(ours[-1], theirs[-1]):
                raise ConfigError(
                    f"vocabulary is {self.vocabulary}, but the student has {ours[-1]} logits and the teacher {theirs[-1]}; "
                    "expected at most the smaller number"
                )
            return self.vocabulary
        if ours != theirs:
            smaller, hint = min(ours[-1], theirs[-1]), ""
            if ours[:-1] == theirs[:-1] and smaller > 1:
                hint = (
                    f": vocabularies of {ours[-1]} and {theirs[-1]}; where one tokenizer's words are padded differently, give "
                    f"the loss vocabulary={smaller}, or len(tokenizer) if that is less"
                )
            raise ConfigError(f"student {tuple(ours)} and teacher {tuple(theirs)} differ in shape{hint}")
        return ours[-1]

    def _labels(self, target: Target, lead: torch.Size, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The label of each token, 0 where it does not count, and whether it does."""
        assert target.labels is not None and target.counted is not None
        labels, counted = checked_labels(Labels(target.labels, target.counted), lead, vocabulary, self.ignore_index)
        return labels.to(device), counted.to(device)


def _over(factor: float, counts: Mapping[str, float] | None, part: str) -> float:
    """The factor of a part's sum; 0 where nothing counts."""
    if counts is None or part not in counts:
        return factor
    return factor / counts[part] if counts[part] else 0.0


@hinted
@dataclass(frozen=True)
class SoftTarget(LogitLoss):
    """Cross entropy with the labels plus weight * T^2 * KL(teacher || student) of logits softened by a temperature T.

    Its parts are `soft_target` and, with labels, `cross_entropy` (Hinton et al. 2015, section 2). The defaults are those of
    TSPipe's distillation benchmark.

    Args:
        temperature: T, above 0, by which the logits of both models are divided for the divergence.
        weight: the factor of the divergence, at least 0.
    """

    part = "soft_target"
    temperature: float = 4.0
    weight: float = 0.1
    _: KW_ONLY
    cross_entropy: float = 1.0

    def divergence(self) -> Divergence:
        """The forward divergence."""
        return divergences.forward_kl


@hinted
@dataclass(frozen=True)
class ForwardKL(LogitLoss):
    """KL(teacher || student), the part `forward_kl`: the student gives mass wherever the teacher does (Hinton et al. 2015).

    Args:
        temperature: T, above 0, by which the logits of both models are divided for the divergence.
        weight: the factor of the divergence, at least 0.
    """

    part = "forward_kl"
    temperature: float = 1.0
    weight: float = 1.0

    def divergence(self) -> Divergence:
        """The forward divergence."""
        return divergences.forward_kl


@hinted
@dataclass(frozen=True)
class ReverseKL(LogitLoss):
    """KL(student || teacher), the part `reverse_kl`: the student gives no mass where the teacher does not (Gu et al. 2024).

    Args:
        temperature: T, above 0, by which the logits of both models are divided for the divergence.
        weight: the factor of the divergence, at least 0.
    """

    part = "reverse_kl"
    temperature: float = 1.0
    weight: float = 1.0

    def divergence(self) -> Divergence:
        """The reverse divergence."""
        return divergences.reverse_kl


@hinted
@dataclass(frozen=True)
class JSD(LogitLoss):
    """The generalised Jensen-Shannon divergence, the part `jsd` (GKD, Agarwal et al. 2024, section 2).

    With the mixture m = beta * teacher + (1 - beta) * student it is beta * KL(teacher || m) + (1 - beta) * KL(student || m).
    As in TRL, beta 0 stands for KL(teacher || student) and 1 for KL(student || teacher), which the divergence tends to after
    division by beta or by 1 - beta. TRL's loss is `JSD(beta, temperature, squared=False)`.

    Args:
        beta: the teacher's share of the mixture, 0 to 1.
        temperature: T, above 0, by which the logits of both models are divided for the divergence.
        weight: the factor of the divergence, at least 0.
    """

    part = "jsd"
    beta: float = 0.5
    temperature: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        raise_problems(real_number("beta", self.beta, least=0, most=1))
        super().__post_init__()

    def divergence(self) -> Divergence:
        """The divergence of this beta."""
        if self.beta in (0, 1):
            return divergences.reverse_kl if self.beta else divergences.forward_kl
        return partial(divergences.jensen_shannon, beta=self.beta)


@hinted
@dataclass(frozen=True)
class TotalVariation(LogitLoss):
    """Half the sum of abs(teacher - student) of the probabilities, the part `total_variation` (Wen et al. 2023).

    Its gradient does not get smaller as the two come closer, so the learning rate has to.

    Args:
        temperature: T, above 0, by which the logits of both models are divided for the divergence.
        weight: the factor of the divergence, at least 0.
    """

    part = "total_variation"
    temperature: float = 1.0
    weight: float = 1.0

    def divergence(self) -> Divergence:
        """The total variation."""
        return divergences.total_variation


@hinted
@dataclass(frozen=True)
class TopKKL(LogitLoss):
    """KL(teacher || student) over the teacher's k likeliest classes and all others as one, the part `top_k_kl`.

    What the two models say among the others does not matter, so it needs no more of a teacher than k logits and the sum of
    the others' exponentials.

    Args:
        k: how many classes are compared one by one, at least 1.
        temperature: T, above 0, by which the logits of both models are divided for the divergence.
        weight: the factor of the divergence, at least 0.
    """

    part = "top_k_kl"
    k: int = 64
    temperature: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        raise_problems(whole("k", self.k, 1))
        super().__post_init__()

    def divergence(self) -> Divergence:
        """The divergence of this k."""
        return partial(divergences.top_k_kl, k=self.k)


@hinted
@dataclass(frozen=True)
class LogitsMSE(LogitLoss):
    """The mean squared error of the student's logits from the teacher's, the part `logits_mse` (Ba and Caruana 2014, 2.2).

    Args:
        weight: the factor of the error, at least 0.
    """

    part = "logits_mse"
    weight: float = 1.0

    def divergence(self) -> Divergence:
        """The mean over classes of the squared differences."""
        return divergences.squared_error
