"""What a loss remembers in Python is the same before and after it was tried out."""

import itertools
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.cases import linears
from support.models import CLASSES, vectors
from torch import Tensor, nn

import pipestill as ps
from pipestill.model.remembered import Remembered

CALLS = 0


class Warms:
    """A loss that counts its calls, and weighs the divergence by their number."""

    def __init__(self) -> None:
        self.calls = 0
        self.seen: list[int] = []
        self.inner = {"best": np.zeros(2)}

    def __call__(self, student: Tensor, teacher: Tensor, target: Any) -> Tensor:
        self.calls += 1
        self.seen.append(len(student))
        self.inner["best"] += 1.0
        return F.mse_loss(student, teacher) * min(1.0, self.calls / 20)


class CountsInAModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, student: Tensor, teacher: Tensor, target: Any) -> Tensor:
        self.calls += 1
        return F.mse_loss(student, teacher) * min(1.0, self.calls / 20)


def in_a_closure() -> Any:
    calls = 0

    def loss(student: Tensor, teacher: Tensor, target: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss.calls = calls  # type: ignore[attr-defined]
        return F.mse_loss(student, teacher) * min(1.0, calls / 20)

    loss.calls = 0  # type: ignore[attr-defined]
    return loss


def trained(loss: Any, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    task = ps.Distillation(nn.Sequential(*linears(4, 8, CLASSES)), nn.Sequential(*linears(4, 8, CLASSES)), loss)
    ps.Trainer(task, microbatches=2, device="cpu", **options).fit(vectors())
    return dict(task.student.state_dict())


@pytest.mark.parametrize("make", [Warms, CountsInAModule, in_a_closure])
def test_loss_that_counts_its_calls_does_not_count_dry_runs_and_profiling(make: Any) -> None:
    plain, piped = make(), make()
    expected = trained(plain, strategy="reference")
    assert plain.calls == 6  # three batches in two microbatches each
    got = trained(piped, devices=2)
    assert piped.calls == 6
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_whatever_an_object_remembers_is_put_back_in_place() -> None:
    loss = Warms()
    loss.inner |= {"queue": deque([1]), "set": {1}, "tensor": torch.ones(2), "generator": torch.Generator().manual_seed(1)}
    loss.inner |= {"random": random.Random(3), "numpy": np.random.default_rng(3)}
    seen, tensor = loss.seen, loss.inner["tensor"]

    def drawn() -> list[Any]:
        parts = loss.inner
        return [torch.rand(2, generator=parts["generator"]).tolist(), parts["random"].random(), parts["numpy"].random()]

    remembered = Remembered([loss])
    first = drawn()
    loss(torch.ones(2), torch.zeros(2), None)
    loss.inner["queue"].append(2)
    loss.inner["set"].add(2)
    loss.inner["tensor"] += 1
    loss.inner["more"] = 1
    remembered.put_back()
    assert loss.calls == 0 and loss.seen is seen == [] and "more" not in loss.inner
    assert list(loss.inner["queue"]) == [1] and loss.inner["set"] == {1} and not loss.inner["best"].any()
    assert loss.inner["tensor"] is tensor and tensor.tolist() == [1, 1]
    assert drawn() == first


def counts_globally(student: Tensor, teacher: Tensor, target: Any) -> Tensor:
    global CALLS
    CALLS += 1
    return F.mse_loss(student, teacher)


def test_global_that_a_function_counts_in_is_put_back() -> None:
    remembered = Remembered([counts_globally])
    counts_globally(torch.ones(1), torch.ones(1), None)
    remembered.put_back()
    assert CALLS == 0


def test_models_that_a_loss_can_reach_are_left_alone() -> None:
    model = nn.Linear(2, 2)
    model.calls = 0
    remembered = Remembered([lambda student: model(student), itertools.count()], apart=[model])
    model.calls = 3
    remembered.put_back()
    assert model.calls == 3
