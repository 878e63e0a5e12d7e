"""Trains small tasks and keeps everything that two runs must agree on."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import pipestill as ps
from pipestill.costs import BlockCosts, Costs
from pipestill.schedule import generate

TIMES = ("seconds", "samples_per_second", "bubble", "utilisation")


class Listener(ps.Callback):
    """Remembers what it hears, without the times."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.validations: list[tuple[int, int, dict[str, float]]] = []

    def step(self, values: dict[str, float]) -> None:
        self.steps.append({k: v for k, v in values.items() if k not in TIMES})

    def validation(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        self.validations.append((step, epoch, metrics))


@dataclass
class Outcome:
    """Both models after training (the teacher's names behind "teacher ") and all that was reported on the way."""

    state: dict[str, Tensor]
    steps: list[dict[str, float]]
    validations: list[tuple[int, int, dict[str, float]]]
    metrics: dict[str, float]
    student: nn.Module | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Case:
    """How to build a task and its data, and how to train it. `task` and `loader` are called anew for every run."""

    task: Callable[[], Any]
    loader: Callable[[], Iterable[Any]]
    validate: Callable[[], Iterable[Any]] | None = None
    fit: dict[str, Any] = field(default_factory=lambda: {"epochs": 1})
    trainer: dict[str, Any] = field(default_factory=dict)

    def most_devices(self) -> int:
        """One block of the smaller model on each."""
        task = self.task()
        blocks = [model for model in (task.student_blocks, task.teacher_blocks) if model is not None]
        return len(self.trainer.get("student_partition", ())) or min(map(len, blocks))

    def run(self, strategy: str, devices: int = 1, **knobs: Any) -> Outcome:
        """Train from the same start, whatever was run before."""
        torch.manual_seed(11)
        task = self.task()
        torch.manual_seed(99)  # what a run draws must not depend on this
        torch.rand(devices)
        listener = Listener()
        options: dict[str, Any] = {"lr": 0.05, "microbatches": 3, "log_every": 1, "costs": unit_costs(task)}
        options |= {"device": "cpu", "timeout_seconds": 60.0, "callbacks": [listener], "first_look": False}
        options |= {**self.trainer, **knobs}
        trainer = ps.Trainer(task, strategy=strategy, devices=devices, **options)
        result = trainer.fit(self.loader(), validate=self.validate() if self.validate else None, **self.fit)
        state = state_of(task)
        return Outcome(state, listener.steps, listener.validations, result.metrics, task.student)


def state_of(task: Any) -> dict[str, Tensor]:
    """Copies of all weights and buffers of both models."""
    taught = task.teacher_blocks
    state = {name: tensor.detach().clone() for name, tensor in task.student.state_dict().items()}
    if taught is not None:
        state |= {f"teacher {name}": tensor.detach().clone() for name, tensor in taught.model.state_dict().items()}
    for name, module, _ in task.beside:
        state |= {f"{name}.{key}": tensor.detach().clone() for key, tensor in module.state_dict().items()}
    return state


def unit_costs(task: Any) -> Costs:
    """The same cost for every block: plans without measuring."""
    teacher = task.teacher_blocks
    return Costs(
        tuple(BlockCosts(block.name, 1.0, 2.0, weight_seconds=1.0) for block in task.student_blocks.blocks),
        tuple(BlockCosts(block.name, 1.0) for block in teacher.blocks) if teacher else (),
        views=(1.0,) * task.demands.views,
    )


_generate_once = cache(generate)


def search_less(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Schedules without the long search for the fastest, and each only once: for tests of what they compute."""
    fill, plan = (importlib.import_module(f"pipestill.{name}") for name in ("schedule.pipeline.fill", "plan.plan"))
    patch(fill, "_MOST_WOVEN", 0)
    patch(fill, "_MOVES", 0)
    patch(plan, "generate", _generate_once)


def assert_same(got: Outcome, expected: Outcome) -> None:
    """Weights, buffers and everything reported are the same to the last bit."""
    assert got.state.keys() == expected.state.keys()
    wrong = {
        name: float((tensor.double() - expected.state[name].double()).abs().max())
        for name, tensor in got.state.items()
        if not torch.equal(tensor, expected.state[name])
    }
    assert not wrong
    assert got.steps == expected.steps
    assert got.validations == expected.validations
    assert got.metrics == expected.metrics


def assert_exact(case: Case, strategies: Iterable[str] = ("fill",), devices: Iterable[int] = (2, 3), **trainer: Any) -> None:
    """Every strategy on every number of devices equals `reference`."""
    expected = case.run("reference", **trainer)
    assert expected.steps
    for strategy in strategies:
        for count in devices:
            assert_same(case.run(strategy, count, **trainer), expected)
