"""Trains a supernet's weights and its paths in turn: the batches, the optimizer and the loss of both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pipestill.losses import BlockLoss

ALPHA = "alpha"  # the last part of the names of architecture parameters


@dataclass(frozen=True, slots=True)
class SearchSteps:
    """The order of a run's batches: which of them are for the architecture parameters.

    An epoch has `batches` for the weights, and after every `every` of them one for the architecture. In the first
    `warm_up_epochs` there is one more for the weights in its place.
    """

    batches: int
    every: int
    warm_up_epochs: int

    @property
    def epoch_length(self) -> int:
        """The number of batches of an epoch."""
        return self.batches + self.batches // self.every

    def is_extra(self, place: int) -> bool:
        """Whether the batch at a place of an epoch stands between those for the weights."""
        return place % (self.every + 1) == self.every

    def learns_paths(self, batch: int) -> bool:
        """Whether batch number `batch` of the run is for the architecture parameters, and the others for the weights."""
        epoch, place = divmod(batch, self.epoch_length)
        return epoch >= self.warm_up_epochs and self.is_extra(place)


class Interleaved:
    """Batches of `train`, in each epoch once through, and between them held-out ones where `steps` has them.

    Told the epoch by `sampler.set_epoch`, by each thread that reads it.
    """

    def __init__(self, train: DataLoader[Any], held_out: DataLoader[Any], steps: SearchSteps) -> None:
        assert len(train) == steps.batches
        self.train = train
        self.held_out = held_out
        self.steps = steps
        self.epoch_of = threading.local()  # under 'ls' several ranks of one process read at once

    @property
    def sampler(self) -> Interleaved:
        """The object that is told the epoch: this one."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set which pass comes next in this thread."""
        self.epoch_of.value = epoch

    def __len__(self) -> int:
        return self.steps.epoch_length

    def __iter__(self) -> Iterator[Any]:
        epoch = getattr(self.epoch_of, "value", 0)
        between = self.train if epoch < self.steps.warm_up_epochs else self.held_out
        main, extra = iter(self.train), chain.from_iterable(repeat(between))
        for place in range(len(self)):
            yield next(extra if self.steps.is_extra(place) else main)


class Alternating(torch.optim.Optimizer):
    """SGD with Nesterov's momentum for weights, Adam for architecture parameters: those that have a gradient move.

    A supernet gives gradients to one kind in each step, so this one needs no count of steps, and a block that moves to
    another rank takes along all that is remembered. `params` are the two groups of `weights_and_alphas`. `lr` and its
    schedule are of the weights, `alpha_lr` is constant. After a step, the entries of alpha that moved have the same
    chance together as before it, so that those of paths that were not sampled stay (ProxylessNAS, section 3.2.1).
    """

    def __init__(
        self, params: list[dict[str, Any]], lr: float, alpha_lr: float = 1e-3, momentum: float = 0.9,
        weight_decay: float = 0.0, betas: tuple[float, float] = (0.0, 0.999),
    ) -> None:  # fmt: skip
        weights, alphas = params
        self.alpha_lr = alpha_lr
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.SGD([weights], lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay),
            torch.optim.Adam([alphas], lr=alpha_lr, betas=betas),
        )
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.param_groups[1]["lr"] = self.alpha_lr
        alphas = [alpha for alpha in self.param_groups[1]["params"] if alpha.grad is not None]
        before = [alpha.clone() for alpha in alphas]
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]  # one memory: what moves between ranks is this one's
            part.step()
        for alpha, old in zip(alphas, before, strict=True):
            moved = alpha.grad != 0
            if moved.any():
                alpha[moved] += old[moved].logsumexp(0) - alpha[moved].logsumexp(0)
        return loss


def weights_and_alphas(parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Make the two groups of `Alternating`, by the parameters' names."""
    kinds: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in parameters.items():
        kinds[name.rpartition(".")[2] == ALPHA].append(parameter)
    return [{"params": kind} for kind in kinds]


class Searched(Protocol):
    """A stage of a supernet, as its loss sees it."""

    def learns_paths(self) -> bool: ...

    def expected_flops(self) -> Tensor: ...


@dataclass(frozen=True)
class WithFlops:
    """A block's loss and, on the batches for its architecture parameters, `weight` times its expected FLOPs.

    The FLOPs are a fraction of those of the most expensive path, as latency is in ProxylessNAS (Cai et al. 2019, section 3.3).
    """

    loss: BlockLoss
    stage: Searched
    weight: float

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        value = self.loss(student, teacher)
        return value + self.weight * self.stage.expected_flops() if self.stage.learns_paths() else value


def rows_apart(count: int, share: float, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Divide rows 0 to `count` - 1 at random into those to train on and a `share` that is held out."""
    order = torch.randperm(count, generator=generator).tolist()
    held = min(max(1, round(count * share)), count - 1)
    return sorted(order[held:]), sorted(order[:held])


def length(dataset: object) -> int:
    """Count the samples of a dataset."""
    assert isinstance(dataset, Sized)
    return len(dataset)
