"""The arguments of a trainer, as one value that its engine reads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property
from types import NoneType
from typing import Any

import torch
from torch import nn

from pipestill.arguments import (
    function,
    listeners,
    metric_problems,
    one_of,
    optimizing,
    parse_bytes,
    raise_problems,
    real_number,
    whole,
)
from pipestill.costs import Costs
from pipestill.errors import ConfigError, PlanError
from pipestill.losses import Metric
from pipestill.optim import Schedule, SchedulerFactory, Schedules, make_optimizer
from pipestill.runtime.world import choose_device_type
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.train.callbacks import Callback
from pipestill.train.data import SplitBatch, inputs_and_targets

_SIZES = "blocks of each stage, such as [3, 3]"


@dataclass(frozen=True, eq=False)
class TrainerOptions:
    """The arguments of a `Trainer`, which documents them, and what follows from them.

    What is the same for all kinds of task is checked here, the rest by the engine.
    """

    task: Any
    _: KW_ONLY
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    lr: float = 0.1
    optimizer_options: Mapping[str, Any] | None = None
    param_groups: Callable[[dict[str, nn.Parameter]], list[dict[str, Any]]] | None = None
    lr_schedule: Schedule | SchedulerFactory | None = None
    weight_decay_schedule: Schedule | None = None
    devices: int = 1
    strategy: str | None = None
    microbatches: int = 8
    staleness: int | None = None
    student_staleness: int = 0
    split_backward: bool = False
    stash: int | str | None = None
    run_ahead: int | None = None
    clip_grad_norm: float | None = None
    batch_norm: str = "microbatch"
    student_partition: Sequence[int] | None = None
    teacher_partition: Sequence[int] | None = None
    costs: Costs | BlockProfile | None = None
    memory: float | str | None = None
    device: str | None = None
    metrics: Mapping[str, Metric] | None = None
    split_batch: SplitBatch = inputs_and_targets
    length_axis: int | None = None
    seed: int = 0
    log_every: int = 10
    callbacks: Sequence[Callback] = ()
    first_look: bool = True
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        """Raise everything that is wrong at once: `PlanError` where a count is, else `ConfigError`."""
        counts = ("devices", "microbatches", "log_every")
        wrong_counts = [problem for name in counts for problem in whole(name, getattr(self, name), 1)]
        raise_problems([*wrong_counts, *self._problems()], PlanError if wrong_counts else ConfigError)
        _ = self.device_type, self.memory_bytes  # refused now, where this machine lacks them or they cannot be read

    def _problems(self) -> Iterator[str]:
        schedules = {name: getattr(self, name) for name in ("lr_schedule", "weight_decay_schedule")}
        yield from optimizing(self.optimizer, self.lr, self.optimizer_options, self.param_groups, schedules)
        yield from one_of("device", self.device, (str, NoneType), "'cpu', 'cuda' or None")
        yield from function("split_batch", self.split_batch, "a function from what the loader yields to (inputs, targets)")
        yield from whole("seed", self.seed)
        yield from listeners(self.callbacks)
        yield from real_number("timeout_seconds", self.timeout_seconds, above=0)
        for name in ("length_axis", "staleness", "run_ahead"):
            if getattr(self, name) is not None:
                yield from whole(name, getattr(self, name))
        yield from whole("student_staleness", self.student_staleness)
        if self.clip_grad_norm is not None and self.clip_grad_norm != float("inf"):
            yield from real_number("clip_grad_norm", self.clip_grad_norm, above=0)
        yield from one_of("split_backward", self.split_backward, bool, "True or False")
        yield from one_of("first_look", self.first_look, bool, "True or False")
        if self.stash is not None and not isinstance(self.stash, str):
            yield from whole("stash", self.stash)
        for name in ("student_partition", "teacher_partition"):
            yield from one_of(name, getattr(self, name), (Sequence, NoneType), _SIZES)
        yield from metric_problems(self.metrics)

    def given(self, names: Sequence[str]) -> list[str]:
        """Select those of some options that have another value than their default."""
        defaults = {field.name: field.default for field in fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    @cached_property
    def device_type(self) -> str:
        """The kind of device, "cpu" or "cuda"; `DeviceError` where this machine has too few."""
        return choose_device_type(self.device, self.devices)

    @cached_property
    def memory_bytes(self) -> int | None:
        """Most bytes that a device may hold; None is no limit."""
        return None if self.memory is None else parse_bytes(self.memory)

    def schedules(self, trained: dict[str, nn.Parameter]) -> Schedules:
        """Make the schedules of the optimizers' rates; `trained` is everything that they train, by name."""
        return Schedules(self.lr, self.lr_schedule, self.weight_decay_schedule, lambda: self.make_optimizer(trained))

    def make_optimizer(self, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimizer of some parameters, such as those of a stage; `ConfigError` where that cannot be.

        Args:
            parameters: what the optimizer trains, by name.
        """
        return make_optimizer(
            self.optimizer, parameters, lr=self.lr, options=dict(self.optimizer_options or {}), param_groups=self.param_groups
        )
