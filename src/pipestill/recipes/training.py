"""How one model is trained: its optimizer, its rates and for how long."""

from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipestill.lr_schedules import LrSchedule
from pipestill.optim import LARS

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "lars": LARS}


@dataclass(frozen=True)
class Training:
    """How one model is trained.

    Args:
        epochs: passes over the data
        optimizer: class of the optimizer
        lr: learning rate on which `lr_schedule` is a factor
        optimizer_options: further arguments of the optimizer, by name
        lr_schedule: a function from the number of all steps to a schedule (default: the rate is constant)
        param_groups: a function from a model's named parameters to groups for the optimizer (default: one group)
        weight_decay_schedule: a function from the number of all steps to factors on the weight decay (default: constant)
    """

    epochs: int
    optimizer: type[torch.optim.Optimizer]
    lr: float
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    lr_schedule: Callable[[int], LrSchedule] | None = None
    param_groups: Callable[[dict[str, nn.Parameter]], list[dict[str, Any]]] | None = None
    weight_decay_schedule: Callable[[int], LrSchedule] | None = None

    def arguments(self, loader: Sized) -> dict[str, Any]:
        """The arguments of a `Trainer` that trains so on the batches of `loader`."""
        total_steps = self.epochs * len(loader)
        return {
            "optimizer": self.optimizer,
            "lr": self.lr,
            "optimizer_options": self.optimizer_options,
            "param_groups": self.param_groups,
            "lr_schedule": self.lr_schedule(total_steps) if self.lr_schedule else None,
            "weight_decay_schedule": self.weight_decay_schedule(total_steps) if self.weight_decay_schedule else None,
        }


def warmed_up(schedule: Callable[..., LrSchedule], fraction: float) -> Callable[[int], LrSchedule]:
    """Make a function from the number of all steps to a cosine or linear schedule with a warm-up over that fraction of them."""
    return lambda total_steps: schedule(total_steps, warm_up_steps=min(round(fraction * total_steps), total_steps))


def without_decay(parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Make groups for an optimizer: weights, and parameters of at most one dimension (biases, norms), which do not decay."""
    decayed, plain = ([p for p in parameters.values() if (p.dim() > 1) is weights] for weights in (True, False))
    return [group for group in ({"params": decayed}, {"params": plain, "weight_decay": 0.0}) if group["params"]]
