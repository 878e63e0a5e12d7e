"""Sums of a divergence and a cross entropy over tokens, with their gradients, a chunk of tokens at a time."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipestill.losses.divergences import Divergence, cross_entropy
from pipestill.losses.logits import Logits
from pipestill.losses.sources import Head, Source, Tokens, head_of, tensors_of

_PIECE = {"cpu": 2**18, "other": 2**23}
"""How many logits are worked on at a time: a few rows that stay in a CPU's cache, or enough to fill another device."""
_CHUNK = {"cpu": 128, "other": 1024}
"""For how many tokens a linear head computes logits at a time."""


@dataclass(frozen=True)
class Work:
    """What is summed over the tokens of some logits. Tokens without any weight are skipped."""

    divergence: Divergence
    temperature: float
    weights: Tensor
    """How much each token counts in the divergence, (tokens,), float64."""
    factor: float
    """The factor of the divergence's sum; with 0 it is 0."""
    labels: Tensor | None
    """The class index of each token, (tokens,), any index where its weight is 0; None leaves the cross entropy out."""
    label_weights: Tensor
    """1 where a token's label counts and 0 elsewhere, (tokens,), float64."""
    label_factor: float
    """The factor of the cross entropy's sum; with 0 it is 0."""
    vocabulary: int
    """How many of the logits are read, the first ones."""
    chunk_size: int | None
    """Tokens of a chunk; None for what suits the device."""
    teacher_width: int | None = None
    """How many columns of the teacher's are read; None for as many as of the student's."""

    @property
    def has_labels(self) -> bool:
        """Whether there is a cross entropy to sum."""
        return self.labels is not None and self.label_factor != 0.0


def sums_of(work: Work, student: Logits, teacher: Logits) -> tuple[Tensor, Tensor]:
    """Compute two scalars, the sums of the divergence and of the cross entropy. Gradients go to the student only."""
    heads = (head_of(student), head_of(teacher))
    sums: tuple[Tensor, Tensor] = _Sums.apply(work, heads, *tensors_of(student), *tensors_of(teacher))  # type: ignore[no-untyped-call]
    return sums


class _Sums(torch.autograd.Function):
    """The two sums. Gradients are made along with the values, which need the same logits.

    They are those of the total. Where a backward gives the sums different factors, gradients are computed again with these.
    """

    @staticmethod
    def forward(ctx: Any, work: Work, heads: tuple[Head | None, ...], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.work = work
        ctx.heads = heads
        ctx.wanted = ctx.needs_input_grad[2:5]
        ctx.save_for_backward(*tensors)
        (divergence, label), ctx.gradients = _run(work, heads, tensors, ctx.wanted)
        assert tensors[0] is not None
        dtype = torch.promote_types(tensors[0].dtype, torch.float32)
        return divergence.to(dtype), label.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_divergence: Tensor, of_label: Tensor) -> tuple[Any, ...]:
        work: Work = ctx.work
        known = not of_divergence.is_meta  # where only costs are computed, nothing is
        factor, label_factor = (of_divergence.item(), of_label.item()) if known else (1.0, 1.0)
        if not work.has_labels:
            label_factor = factor
        elif not work.factor:
            factor = label_factor
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or factor != label_factor:
            work = replace(work, factor=work.factor * factor, label_factor=work.label_factor * label_factor)
            _, gradients = _run(work, ctx.heads, ctx.saved_tensors, ctx.wanted)
        elif factor != 1.0:
            gradients = [None if gradient is None else gradient.mul_(factor) for gradient in gradients]
        return None, None, *gradients, None, None, None


@torch.no_grad()
def _run(
    work: Work, heads: Sequence[Head | None], tensors: Sequence[Tensor | None], wanted: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The two sums, float64, and the gradients of their total by the student's tensors, those that are wanted."""
    device = work.weights.device
    cast = torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()
    with cast:  # a head has its own type; the rest is float64
        student = Source(heads[0], tensors[:3], wanted, work.vocabulary)
        teacher = Source(heads[1], tensors[3:], (False, False, False), work.teacher_width or work.vocabulary)
        values = torch.zeros(2, len(work.weights), dtype=torch.float64, device=device)
        for tokens in _chunks(work, computed=any(heads)):
            of_student, of_teacher = student.logits(tokens), teacher.logits(tokens)
            room = student.room(tokens, of_student)
            for piece in _slices(len(of_student), _fitting(work.vocabulary, device)):
                logits, some = of_student[piece], _part(tokens, piece)
                values[:, some], gradient = _piece(work, some, logits, of_teacher[piece])
                if room is not None and gradient is not None:
                    room[piece] = student.before_cap(gradient, logits)
            if room is not None:
                student.add(tokens, room)
        return values.sum(-1), student.gradients()


def _chunks(work: Work, computed: bool) -> Iterator[Tokens]:
    """The tokens that count, in chunks: slices where all do, else their numbers. `computed`: some logits are not given."""
    device = work.weights.device
    chunk = _CHUNK.get(device.type, _CHUNK["other"]) if computed else _fitting(work.vocabulary, device)
    size = chunk if work.chunk_size is None else work.chunk_size
    counts = (work.weights != 0) | (work.label_weights != 0)
    numbers = None if counts.is_meta else counts.nonzero().squeeze(-1)  # where only costs are computed, all count
    if numbers is None or len(numbers) == len(counts):
        yield from _slices(len(counts), size)
    elif len(numbers):
        yield from numbers.split(size)


def _fitting(vocabulary: int, device: torch.device) -> int:
    """For how many tokens single numbers are worked on at a time."""
    return max(1, _PIECE.get(device.type, _PIECE["other"]) // vocabulary)


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _part(tokens: Tokens, piece: slice) -> Tokens:
    """The tokens of a piece of a chunk."""
    return slice(tokens.start + piece.start, tokens.start + piece.stop) if isinstance(tokens, slice) else tokens[piece]


def _piece(work: Work, tokens: Tokens, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weighted values of some tokens, (2, tokens), and the gradient of their total by the student's logits."""
    values = torch.zeros(2, len(student), dtype=torch.float64, device=student.device)
    gradient = None
    if work.labels is not None and work.has_labels:
        weights = work.label_weights[tokens] * work.label_factor
        of_tokens, gradient = cross_entropy(_copied(student), work.labels[tokens])
        values[1] = _weighted(of_tokens, weights)
        gradient.mul_(weights.unsqueeze(-1))
    if work.factor:
        weights = work.weights[tokens] * work.factor
        of_tokens, by_scaled = work.divergence(_copied(student), _copied(teacher), work.temperature)
        values[0] = _weighted(of_tokens, weights)
        by_scaled.mul_(weights.unsqueeze(-1) / work.temperature)
        gradient = by_scaled if gradient is None else gradient.add_(by_scaled)
    return values, gradient


def _copied(logits: Tensor) -> Tensor:
    return logits.to(torch.float64, copy=True)


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """The products, 0 where the weight is 0 even if the value is infinite."""
    return torch.where(weights == 0, 0.0, values * weights)
