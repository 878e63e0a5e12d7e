"""What a run reports while it trains: who listens, what a logged step says, and when a loss is refused."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pipestill.errors import TrainingError
from pipestill.runtime.transport.protocol import Message, Transport, receive
from pipestill.schedule import Action, Lane, Op, Role


class RunListener(Protocol):
    """Receives the reports of a run, on rank 0 only."""

    def step(self, values: dict[str, float]) -> None:
        """A logged step: step, epoch, loss and its parts, lr, seconds, samples_per_second, bubble and more."""

    def validation(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """The metrics of a validation after a step."""


class FigureExchange:
    """Brings each rank's figures of a logged step to the first of `ranks`, which reports them.

    The reporting rank gives its own figures at the end of a step and collects the others' later: they may update after
    it, and wait for it meanwhile.
    """

    def __init__(self, transport: Transport, rank: int, ranks: Sequence[int], segment: int = 0) -> None:
        self.transport = transport
        self.rank = rank
        self.ranks = ranks
        self.segment = segment
        self._given: tuple[int, Tensor] | None = None
        """On the reporting rank: the step whose figures are not collected yet, and its own figures."""

    @property
    def reports(self) -> bool:
        """Whether this is the rank that reports."""
        return self.rank == self.ranks[0]

    def give(self, step: int, figures: Tensor, sizes: Sequence[int]) -> None:
        """Send the `figures` of this rank (float64) or, on the reporting rank, announce those of all ranks, by their sizes."""
        if not self.reports:
            self.transport.send(self._message(step, self.rank), [figures])
            return
        self._given = step, figures
        for rank, size in zip(self.ranks[1:], sizes[1:], strict=True):
            self.transport.post(self._message(step, rank), [torch.empty(size, dtype=torch.float64)])

    def collect(self) -> Generator[Message, None, list[Tensor]]:
        """The figures of all ranks, in their order, of the step that was given last; none where they were collected before."""
        if self._given is None:
            return []
        step, mine = self._given
        self._given = None
        figures = [mine]
        for rank in self.ranks[1:]:
            figures += yield from receive(self.transport, self._message(step, rank))
        return figures

    def _message(self, step: int, rank: int) -> Message:
        return Message(
            Lane.REPORT, Action(Role.STUDENT, rank, Op.UPDATE, None, step), rank, self.ranks[0], self.segment
        )


def logged_values(step: int, epoch: int, losses: Mapping[str, float], **rest: float) -> dict[str, float]:
    """One line of metrics.jsonl for models that are trained end to end: the loss, and its parts where it has several."""
    parts = losses if len(losses) > 1 else {}
    return {"step": step + 1, "epoch": epoch + 1, "loss": sum(losses.values()), **parts, **rest}


def logged_blocks(step: int, epoch: int, losses: Mapping[int, float], **rest: float) -> dict[str, float]:
    """One line of metrics.jsonl for blocks that are trained alone: the sum of their losses, and each."""
    parts = {f"block_{block}": loss for block, loss in losses.items()}
    return {"step": step + 1, "epoch": epoch + 1, "loss": math.fsum(losses.values()), **parts, **rest}


def check_finite(losses: Mapping[str, float], step: int) -> None:
    """`TrainingError` when a part of the loss is NaN or infinite; the weights are still those before the step."""
    if not all(map(math.isfinite, losses.values())):
        parts = ", ".join(f"{name} {value:g}" for name, value in losses.items())
        raise TrainingError(
            f"the loss is not finite in step {step + 1} ({parts}); no update was made with it; "
            "lower the learning rate, or look at the data of that step"
        )


def check_finite_blocks(losses: Mapping[int, float], step: int) -> None:
    """`TrainingError` when a block's loss is NaN or infinite."""
    wrong = [f"block {block}: {loss:g}" for block, loss in losses.items() if not math.isfinite(loss)]
    if wrong:
        raise TrainingError(
            f"the loss is not finite by batch {step + 1} ({', '.join(wrong)}); lower the learning rate, or look at the data"
        )
