"""The mathematics of divergences between two models' logits: values, and gradients by the student's logits.

With a = student / T and b = teacher / T, q and p their softmaxes, and r = log(p / q):

| divergence | value of one token | gradient by a |
|---|---|---|
| forward KL | sum p r | q - p |
| reverse KL | -sum q r | q (-r - value) |
| JSD(beta), m = beta p + (1 - beta) q | beta KL(p, m) + (1 - beta) KL(q, m) | (1 - beta) q (log(q / m) - KL(q, m)) |
| total variation | sum abs(p - q) / 2 | q (h - sum q h), h = sign(q - p) / 2 |

A sum of logarithms as it stands loses all digits where the two models almost agree, and may come out negative. So q - p is
taken as (p + q) tanh(-r / 2), and since q - p adds up to 0 it is added to each term: the terms are then small of second order
and at least 0. Everything is float64: logits of two models may agree in most of float32's digits.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""From float64 logits of student and teacher, (tokens, vocabulary), which it may overwrite, and the temperature T, to the
values, (tokens,), and their gradients by student / T, (tokens, vocabulary)."""

_TINY = torch.finfo(torch.float64).tiny


class Pair(NamedTuple):
    """The softmaxes of two models' logits, and how they differ; each (tokens, vocabulary)."""

    student: Tensor
    """The student's probabilities q."""
    teacher: Tensor
    """The teacher's probabilities p."""
    log_ratio: Tensor
    """r = log(p / q); 0 where both are -inf."""
    difference: Tensor
    """q - p, exact to its own last digits."""


def softmax_(logits: Tensor) -> Tensor:
    """Replace logits by their softmax over the last axis; return the logarithm of the sum of exponentials, (tokens, 1)."""
    largest = logits.amax(-1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    logits.div_(total)
    return total.log_().add_(largest)


def pair_of(student: Tensor, teacher: Tensor, temperature: float) -> Pair:
    """Compare two models' logits, which are overwritten."""
    if temperature != 1.0:
        student.div_(temperature)
        teacher.div_(temperature)
    log_ratio = teacher - student
    log_ratio.sub_(softmax_(teacher) - softmax_(student))
    log_ratio.nan_to_num_(0.0, torch.inf, -torch.inf)  # -inf on both sides: the two agree. Other NaNs are in the softmaxes too
    difference = torch.mul(log_ratio, -0.5).tanh_().mul_(student + teacher)
    return Pair(student, teacher, log_ratio, difference)


def _times(probability: Tensor, logarithm: Tensor) -> Tensor:
    """The product of a probability and a logarithm, 0 where the probability is 0."""
    return (probability * logarithm).nan_to_num_(0.0, torch.inf, -torch.inf)


def _total(terms: Tensor) -> Tensor:
    """The sum of terms that are at least 0 up to rounding."""
    return terms.sum(-1).clamp_min_(0.0)


def forward_kl(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(teacher || student): the student must give mass wherever the teacher does."""
    _, p, r, d = pair_of(student, teacher, temperature)
    return _total(_times(p, r).add_(d)), d


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(student || teacher): the student must not give mass where the teacher does not."""
    q, _, r, d = pair_of(student, teacher, temperature)
    terms = _times(q, r).add_(d).neg_()
    values = _total(terms)
    return values, _times(q, r).addcmul_(q, values.unsqueeze(-1)).neg_()


def jensen_shannon(student: Tensor, teacher: Tensor, temperature: float, beta: float) -> tuple[Tensor, Tensor]:
    """The generalised Jensen-Shannon divergence for beta between 0 and 1, both excluded (Agarwal et al. 2024, section 2)."""
    q, p, _, d = pair_of(student, teacher, temperature)
    by_q = q * (d / q.clamp_min(_TINY)).mul_(-beta).log1p_()  # q log(m / q)
    by_p = p * (d / p.clamp_min(_TINY)).mul_(1.0 - beta).log1p_()  # p log(m / p)
    of_student = by_q.add(d, alpha=beta).sum(-1, keepdim=True).neg_()  # KL(student || mixture)
    values = _total(by_p.mul_(-beta).add_(by_q, alpha=beta - 1.0))
    return values, by_q.addcmul_(q, of_student).mul_(beta - 1.0)


def total_variation(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Half the sum of the probabilities' distances: the most that two models' chances of any event differ."""
    q, _, _, d = pair_of(student, teacher, temperature)
    half = d.sign().mul_(0.5)
    return d.abs_().sum(-1).mul_(0.5), half.sub_((q * half).sum(-1, keepdim=True)).mul_(q)


def top_k_kl(student: Tensor, teacher: Tensor, temperature: float, k: int) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) over the teacher's k likeliest words, and all others as one class."""
    top = teacher.topk(min(k, teacher.shape[-1]), -1).indices
    q, p, r, d = pair_of(student, teacher, temperature)
    inside = _total(_times(p.gather(-1, top), r.gather(-1, top)).add_(d.gather(-1, top)))
    tail_p, tail_d = (x.scatter(-1, top, 0.0).sum(-1, keepdim=True) for x in (p, d))  # never 1 - sum, which loses digits
    tail_q = q.scatter(-1, top, 0.0).sum(-1, keepdim=True)
    ratio = tail_d / tail_p.clamp_min(_TINY)  # Q / P - 1
    outside = _times(tail_p, ratio.log1p().neg_()).add_(tail_d).squeeze(-1)
    gradient = (q * (tail_d / tail_q.clamp_min(_TINY))).scatter_(-1, top, d.gather(-1, top))
    return inside.add_(outside.clamp_min_(0.0)), gradient


def cached_top_k_kl(student: Tensor, kept: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same from what a cache keeps of a teacher, (tokens, 2k + 3): k logits, which words' they are, and the others' mass.

    The mass is the logarithm of the sum of exponentials of the other logits / T. Two more columns are not read.
    """
    k = kept.shape[-1] // 2 - 1
    values, top, tail = kept[:, :k] / temperature, kept[:, k : 2 * k].long(), kept[:, 2 * k : 2 * k + 1]
    log_p = torch.cat([values, tail], -1).log_softmax(-1)
    scaled = student.div_(temperature) if temperature != 1.0 else student
    at_top = scaled.gather(-1, top)
    log_sum = softmax_(scaled)
    q = scaled
    tail_q = q.scatter(-1, top, 0.0).sum(-1, keepdim=True)
    log_q = torch.cat([at_top - log_sum, tail_q.log()], -1)
    p, of_student = log_p.exp(), torch.cat([q.gather(-1, top), tail_q], -1)
    r = (log_p - log_q).nan_to_num_(0.0, torch.inf, -torch.inf)
    d = torch.mul(r, -0.5).tanh_().mul_(p + of_student)
    gradient = (q * (d[:, k:] / tail_q.clamp_min(_TINY))).scatter_(-1, top, d[:, :k])
    return _total(_times(p, r).add_(d)), gradient


def squared_error(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The mean over the vocabulary of squared differences of the logits; equal logits, -inf among them, differ by 0."""
    difference = torch.where(student == teacher, 0.0, student - teacher)
    if temperature != 1.0:
        difference.div_(temperature)
    values = difference.square().mean(-1)
    return values, difference.mul_(2.0 / difference.shape[-1])


def cross_entropy(student: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross entropy of logits, which are overwritten, with class indices, (tokens,), and its gradient by the logits."""
    labels = labels.unsqueeze(-1)
    picked = student.gather(-1, labels)
    values = softmax_(student).sub_(picked).clamp_min_(0.0)
    student.scatter_add_(-1, labels, torch.full_like(picked, -1.0))
    return values.squeeze(-1), student
