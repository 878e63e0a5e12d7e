"""Measures seconds of finished work, on the CPU and on GPUs, and what an optimizer's steps take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from pipestill.model.nests import num_bytes
from pipestill.optim import OptimizerFactory

Seconds = dict[tuple[str, int], list[float]]
"""The seconds of each piece of a step, every time that it ran. A piece is a kind of work ("teacher", "student", "loss",
"backward" ...) and its block."""


def now() -> float:
    """The seconds of a clock, read once all work that was given to a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Notes the seconds from one mark to the next, by a clock of its own (default: that of finished work on this machine)."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.clock = clock or now
        self.seconds: Seconds = {}
        self.last = self.clock()

    def mark(self, name: str, index: int) -> None:
        """Note the seconds since the last mark as those of a piece, which ends here."""
        self.seconds.setdefault((name, index), []).append(self.clock() - self.last)
        self.last = self.clock()


def trial_optimizer(parameters: Mapping[str, nn.Parameter], make: OptimizerFactory) -> torch.optim.Optimizer | None:
    """Make an optimizer over copies of parameters, with gradients of zero: its steps change no model. None without any."""
    copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    for copy in copies.values():
        copy.grad = torch.zeros_like(copy)
    return make(copies) if copies else None


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of an optimizer's state, once it has taken a step."""
    return num_bytes([list(state.values()) for state in optimizer.state.values()])
