"""How optimizers are made of what a user gave; and LARS, which neither torch nor a small kept library has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.arguments import shown
from pipestill.errors import ConfigError

OptimizerFactory = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]
"""Makes an optimizer of named parameters: one for each stage, or for each block that is trained alone."""


def make_optimizer(
    make: Callable[..., Any],
    parameters: dict[str, nn.Parameter],
    *,
    lr: float,
    options: Mapping[str, Any],
    param_groups: Callable[[dict[str, nn.Parameter]], list[dict[str, Any]]] | None,
) -> torch.optim.Optimizer:
    """The optimizer of a stage's (or a block's) named parameters.

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


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step on each weight is scaled by the weight's norm (You et al. 2017, algorithm 1).

    A gradient g of weights w, with weight decay, becomes g * `trust` * |w| / |g|, where both norms are above 0; parameters of
    at most one dimension (biases, norms) are neither scaled nor decayed, as in BYOL and TSPipe. `momentum` is SGD's own.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.2,
        momentum: float = 0.9,
        weight_decay: float = 1.5e-6,
        trust: float = 0.001,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay), ("trust", trust)):
            if not value >= 0:
                raise ValueError(f"{name} is {value}; expected 0 or more")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if parameter.dim() > 1:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
            weight_norm, gradient_norm = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(gradient)
            scale = torch.where(
                (weight_norm > 0) & (gradient_norm > 0), group["trust"] * weight_norm / gradient_norm, 1.0
            )
            gradient = gradient * scale
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        parameter.add_(buffer, alpha=-group["lr"])
