"""Optimizers and their rates at each step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.blocks import BlockCase
from support.cases import distilled
from support.fits import Case, assert_same
from support.models import CLASSES, vectors
from support.pairwise import every_other
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR, SequentialLR

import pipestill as ps
from pipestill.errors import ConfigError
from pipestill.optim import LARS, Schedules


def warmed_up(optimizer: torch.optim.Optimizer) -> LRScheduler:
    """A scheduler of two others."""
    rising = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    return SequentialLR(optimizer, [rising, CosineAnnealingLR(optimizer, 6)], [2])


FACTORIES: dict[str, Any] = {
    "lambda": lambda optimizer: CosineAnnealingLR(optimizer, 10),
    "partial": partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
    "class": type("Halved", (LambdaLR,), {"__init__": lambda self, opt: LambdaLR.__init__(self, opt, lambda s: 0.5**s)}),
    "sequence": warmed_up,
    "momentum too": lambda optimizer: OneCycleLR(optimizer, 0.2, total_steps=20),
}


def task() -> ps.Distillation:
    return distilled(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, CLASSES))


def by_torch(factory: Callable[..., LRScheduler], steps: int) -> list[float]:
    """The learning rates of a loop as torch's documentation writes it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    scheduler, rates = factory(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # torch's, of a sequence that is just made
@pytest.mark.parametrize("name", every_other(FACTORIES))
def test_torch_schedulers_are_stepped_once_an_update_on_every_stage(name: str) -> None:
    options = {"lr_schedule": FACTORIES[name], "optimizer_options": {"momentum": 0.9}, "lr": 0.1, "microbatches": 2}
    case = Case(task, lambda: vectors((6,) * 4), fit={"epochs": 2}, trainer=options)
    expected = case.run("reference")
    assert [step["lr"] for step in expected.steps] == by_torch(FACTORIES[name], 8)
    for strategy, devices in (("fill", 2), ("1f1b", 4)):
        assert_same(case.run(strategy, devices), expected)
    constant = Case(task, case.loader, fit=case.fit, trainer={**options, "lr_schedule": None}).run("reference")
    assert any(not torch.equal(tensor, constant.state[key]) for key, tensor in expected.state.items())


def test_torch_schedulers_follow_blocks_that_move() -> None:
    """A rank that did not train a block for some batches goes on at the rate of the batch, without a warning."""
    schedule = {"lr_schedule": FACTORIES["lambda"]}
    expected = BlockCase().run("reference", 1, **schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for strategy in ("balanced", "relay-dpu"):
            got = BlockCase().run(strategy, 2, **schedule)
            assert all(torch.equal(tensor, got.student[name]) for name, tensor in expected.student.items())
    assert got.result.losses == pytest.approx(expected.result.losses)


def test_every_group_of_parameters_has_its_own_rate() -> None:
    def groups(parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
        weights, others = ([p for p in parameters.values() if (p.dim() > 1) is many] for many in (True, False))
        return [{"params": weights}, {"params": others, "lr": 0.01, "weight_decay": 0.0}]

    def make(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return LambdaLR(optimizer, [lambda step: 0.9**step, lambda step: 1.0])

    options = {"lr_schedule": make, "param_groups": groups, "optimizer_options": {"weight_decay": 0.1}, "lr": 0.1}
    options["weight_decay_schedule"] = lambda step: 0.5**step
    case = Case(
        lambda: distilled(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)), lambda: vectors((6,) * 4), trainer=options
    )
    assert_same(case.run("fill", 3), case.run("reference"))


def test_functions_of_the_step_and_factories_are_told_apart() -> None:
    made = []

    def probe() -> torch.optim.Optimizer:
        made.append(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9))
        return made[-1]

    for name, factory in FACTORIES.items():
        assert Schedules(0.1, factory, probe=probe).factory is factory, name
    del made[:]
    for function in (lambda step: 0.5, ps.lr_schedules.cosine(10), None):
        assert Schedules(0.1, function, probe=probe).factory is None
    assert not made


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lr_scheduler.ReduceLROnPlateau, "lr_schedule made .*; expected a torch scheduler that follows the step alone"),
        (LambdaLR, "lr_schedule makes no scheduler of an optimizer with 1 groups: TypeError"),
        (lambda: 1.0, r"lr_schedule\(0\) failed: TypeError"),
        (lambda optimizer: optimizer.lr, r"lr_schedule\(0\) failed: AttributeError"),
    ],
)
def test_schedules_that_cannot_be_are_refused_before_training(schedule: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ps.Trainer(task(), lr_schedule=schedule, device="cpu").preflight(vectors((6,)))


def test_lars_scales_weights_and_leaves_biases() -> None:
    """You et al. 2017, algorithm 1, by hand for one step."""
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([2.0]))
    weight.grad, bias.grad = torch.tensor([[0.0, 10.0]]), torch.tensor([1.0])
    LARS([weight, bias], lr=1.0, momentum=0.0, weight_decay=0.0, trust=0.1).step()
    assert torch.allclose(weight, torch.tensor([[3.0, 4.0 - 0.1 * 5.0 / 10.0 * 10.0]]))
    assert torch.equal(bias, torch.tensor([1.0]))
