"""Optimizers as users ask for them, their rates at each step, and LARS, which torch lacks."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pipestill.arguments import checked_factor, shown, try_first
from pipestill.errors import ConfigError

OptimizerFactory = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]
"""Makes an optimizer of named parameters: one for each stage, or in blockwise training for each block."""


def make_optimizer(
    make: Callable[..., Any],
    parameters: dict[str, nn.Parameter],
    *,
    lr: float,
    options: Mapping[str, Any],
    param_groups: Callable[[dict[str, nn.Parameter]], list[dict[str, Any]]] | None,
) -> torch.optim.Optimizer:
    """Make the optimizer of the named parameters of a stage or a block.

    `ConfigError` where it cannot be made, cannot be used by a pipeline, or would train other parameters than these.
    """
    name = getattr(make, "__name__", repr(make))
    try:
        groups = param_groups(parameters) if param_groups else list(parameters.values())
    except Exception as error:
        raise ConfigError(f"param_groups cannot take {_some(parameters)}: {type(error).__name__}: {error}") from error
    try:
        made = make(groups, lr=lr, **options)
    except Exception as error:
        given = "".join(f", {key}={value!r}" for key, value in options.items())
        raise ConfigError(
            f"the optimizer cannot be made: {name}(parameters, lr={lr:g}{given}) gives {type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(f"optimizer {name} gave {shown(made)}; expected a torch.optim.Optimizer")
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{type(made).__name__} computes the loss several times in each step, which a pipeline cannot; choose an "
            "optimizer whose step() needs no closure"
        )
    taken = {id(parameter) for group in made.param_groups for parameter in group["params"]}
    left = [key for key, parameter in parameters.items() if id(parameter) not in taken]
    strange = len(taken) + len(left) - len(parameters)
    if left or strange:
        found = [f"leaves out {_some(left)}"] * bool(left) + [f"has {strange} of somewhere else"] * bool(strange)
        raise ConfigError(
            f"the optimizer {' and '.join(found)}; param_groups must give exactly the parameters that it gets, and what is "
            "not to be trained is frozen beforehand (requires_grad_(False))"
        )
    return made


def _some(names: Iterable[str]) -> str:
    first = list(names)
    return f"{', '.join(map(repr, first[:5]))}{' and more' if len(first) > 5 else ''}"


Schedule = Callable[[int], float]
"""A function from the step, counted from 0, to a factor."""

SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]
"""A function, or a class, that makes a torch scheduler of an optimizer."""


class Schedules:
    """The learning rates and weight decays of every optimizer of a run, as they follow the step."""

    def __init__(
        self,
        lr: float = 0.1,
        lr_schedule: Schedule | SchedulerFactory | None = None,
        weight_decay_schedule: Schedule | None = None,
        probe: Callable[[], torch.optim.Optimizer] | None = None,
    ) -> None:
        """Tell functions of the step from factories of schedulers.

        A scheduler class, or a partial of one, is a factory. Anything else is called with step 0: what then gives a value is
        a function of the step. What fails is a factory if it makes a scheduler of an optimizer.

        Args:
            lr: the learning rate that a function of the step multiplies.
            lr_schedule: a function from the step to a factor, or a factory of schedulers; None keeps the rates.
            weight_decay_schedule: a function from the step to a factor; None keeps the weight decays.
            probe: makes an optimizer like those of the run, of all that is trained. It is never stepped. Only factories
                need it.
        """
        self.lr = lr
        self.factory: SchedulerFactory | None = None
        self.decay_factor = checked_factor("weight_decay_schedule", weight_decay_schedule)
        self._followed: Rates | None = None
        self._lrs: list[float] = []
        if lr_schedule is not None and probe is not None and _makes_schedulers(lr_schedule, probe):
            self.factory = cast(SchedulerFactory, lr_schedule)
            self._followed = Rates(probe(), self)
        self.lr_factor = checked_factor("lr_schedule", None if self.factory else cast(Schedule | None, lr_schedule))

    def rates(self, optimizer: torch.optim.Optimizer) -> Rates:
        """Attach the schedules to one optimizer."""
        return Rates(optimizer, self)

    def lr_at(self, step: int) -> float:
        """The learning rate of the first group at a step, for logs."""
        if self._followed is None:
            return self.lr * self.lr_factor(step)
        while len(self._lrs) <= step:
            self._followed.set(len(self._lrs))
            self._lrs.append(float(self._followed.optimizer.param_groups[0]["lr"]))
        return self._lrs[step]

    def problems(self) -> Iterator[str]:
        """Yield the problems of the functions at the first step."""
        yield from try_first("lr_schedule", self.lr_factor)
        yield from try_first("weight_decay_schedule", self.decay_factor)


class Rates:
    """The learning rates and weight decays of one optimizer's groups, set anew for every step.

    A torch scheduler follows the number of the step, not how often it was asked: a block that other ranks have trained
    meanwhile goes on at the right rate.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedules: Schedules) -> None:
        self.optimizer = optimizer
        self.schedules = schedules
        self.own = [(group, group["lr"], group.get("weight_decay")) for group in optimizer.param_groups]
        """Each group with its own learning rate and weight decay, which functions of the step multiply."""
        self.scheduler = None if schedules.factory is None else _scheduler(schedules.factory, optimizer)
        self.scheduled_step = 0
        """The step that the scheduler is at."""

    def set(self, step: int) -> None:
        """Set the rates for the optimizer's step number `step`; steps never go back."""
        for group, lr, decay in self.own:
            if self.scheduler is None:
                group["lr"] = lr * self.schedules.lr_factor(step)
            if decay is not None:
                group["weight_decay"] = decay * self.schedules.decay_factor(step)
        while self.scheduler is not None and self.scheduled_step < step:
            if self.scheduled_step:
                self.scheduler.step()
            else:
                with warnings.catch_warnings():  # an optimizer that did not train the first batches was not stepped yet
                    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                    self.scheduler.step()
            self.scheduled_step += 1


def _makes_schedulers(schedule: Any, probe: Callable[[], torch.optim.Optimizer]) -> bool:
    """Whether a schedule is a factory of torch schedulers, and no function of the step (see `Schedules`)."""
    made = schedule.func if isinstance(schedule, partial) else schedule
    if isinstance(made, type):
        return issubclass(made, LRScheduler)
    with suppress(Exception):
        schedule(0)
        return False
    with suppress(Exception):
        return isinstance(schedule(probe()), LRScheduler)
    return False


def _scheduler(factory: SchedulerFactory, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Make the scheduler of an optimizer; `ConfigError` where it is none, or does not follow the step alone."""
    try:
        made = factory(optimizer)
    except Exception as error:
        raise ConfigError(
            f"lr_schedule makes no scheduler of an optimizer with {len(optimizer.param_groups)} groups: "
            f"{type(error).__name__}: {error}"
        ) from error
    if isinstance(made, ReduceLROnPlateau) or not isinstance(made, LRScheduler):
        raise ConfigError(f"lr_schedule made {shown(made)}; expected a torch scheduler that follows the step alone")
    return made


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step on each weight is scaled by the weight's norm (You et al. 2017, algorithm 1).

    A gradient g of weights w, with weight decay, becomes g * `trust` * |w| / |g|, where both norms are above 0; parameters of
    at most one dimension (biases, norms) are neither scaled nor decayed, as in BYOL and TSPipe. `momentum` is SGD's own.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.2, momentum: float = 0.9, weight_decay: float = 1.5e-6, trust: float = 0.001
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay), ("trust", trust)):
            if not value >= 0:
                raise ValueError(f"{name} is {value}; expected 0 or more")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if parameter.dim() > 1:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
            weight_norm, gradient_norm = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(gradient)
            scale = torch.where((weight_norm > 0) & (gradient_norm > 0), group["trust"] * weight_norm / gradient_norm, 1.0)
            gradient = gradient * scale
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        parameter.add_(buffer, alpha=-group["lr"])
