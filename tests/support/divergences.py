"""Divergences by their definitions, in float64 and with autograd: what the shipped losses must equal."""

from __future__ import annotations

import torch
from torch import Tensor

import pipestill as ps
from pipestill.losses import LogitLoss


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p log(p / q) over the last axis; 0 where p is 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (torch.where(p > 0, log_p, 0.0) - torch.where(p > 0, log_q, 0.0)), 0.0).sum(-1)


def by_definition(loss: LogitLoss, student: Tensor, teacher: Tensor) -> Tensor:
    """The divergence of each token, with T^2 where the loss has it, without its weight."""
    t = getattr(loss, "temperature", 1.0)
    log_q, log_p = (torch.log_softmax(x.double() / t, -1) for x in (student, teacher))
    value: Tensor
    match loss:
        case ps.losses.ReverseKL() | ps.losses.JSD(beta=1.0):
            value = kl(log_q, log_p)
        case ps.losses.SoftTarget() | ps.losses.ForwardKL() | ps.losses.JSD(beta=0.0):
            value = kl(log_p, log_q)
        case ps.losses.JSD(beta=beta):
            log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
            value = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
        case ps.losses.TotalVariation():
            value = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
        case ps.losses.TopKKL(k=k):
            top = teacher.topk(k, -1).indices
            p, q = log_p.exp(), log_q.exp()
            tails = [x.scatter(-1, top, 0.0).sum(-1, keepdim=True) for x in (p, q)]
            both = [torch.cat([x.gather(-1, top), tail], -1).log() for x, tail in zip((p, q), tails, strict=True)]
            value = kl(*both)
        case ps.losses.LogitsMSE():
            value = (student.double() - teacher.double()).square().mean(-1)
        case _:
            raise AssertionError(loss)
    return value * (t * t if loss.squared else 1.0)
