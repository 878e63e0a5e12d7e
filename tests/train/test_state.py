"""What is kept of a training, and how it goes on from there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.blocks import BlockCase
from support.cases import CASES, distilled
from support.fits import Listener, state_of, unit_costs
from support.models import CLASSES, vectors
from support.momentum import MOMENTUM_CASES, TWO
from torch import Tensor, nn

import pipestill as ps
from pipestill.errors import ModelError, PlanError
from pipestill.train.state import State, load_optimizer_state, optimizer_state

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {}),
    "rprop": (torch.optim.Rprop, {}),
}


def net() -> ps.Distillation:
    torch.manual_seed(3)
    return distilled(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 8), nn.Linear(8, CLASSES))


def trainer(task: Any, strategy: str = "reference", devices: int = 1, optimizer: str = "adamw", **more: Any) -> ps.Trainer:
    make, options = OPTIMIZERS[optimizer]
    return ps.Trainer(
        task, strategy=strategy, devices=devices, optimizer=make, optimizer_options=options, lr=0.05,
        lr_schedule=ps.lr_schedules.cosine(8), microbatches=2, log_every=1, device="cpu", costs=unit_costs(task), **more,
    )  # fmt: skip


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(5)
    return make()


def tensors(state: State) -> dict[str, Tensor]:
    return {**state.parameters, **state.buffers}


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(tensor, expected[name]) for name, tensor in got.items())


TASKS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "distillation": (net, lambda: vectors((6,) * 6), "adamw"),
    "sgd": (net, lambda: vectors((6,) * 6), "sgd"),
    "rprop": (net, lambda: vectors((6,) * 6), "rprop"),
    "new buffers": (CASES["new_buffers"].task, CASES["new_buffers"].loader, "sgd"),
    "loss with buffers": (CASES["centered_loss"].task, CASES["centered_loss"].loader, "sgd"),
    "momentum": (MOMENTUM_CASES["byol"].task, TWO, "adamw"),
}


@pytest.mark.parametrize("name", TASKS)
def test_training_goes_on_from_a_state_to_the_bit(name: str) -> None:
    """Weights, buffers, the teacher, the loss, optimizers, rates, dropout: all are what they would have been."""
    task, loader, optimizer = TASKS[name]
    batches = list(loader()) * 2
    once, twice, again = (seeded(task) for _ in range(3))
    uninterrupted = Listener()
    trainer(once, optimizer=optimizer, callbacks=[uninterrupted]).fit(batches)
    first = trainer(twice, optimizer=optimizer)
    first.fit(batches[:2])
    state = first.engine.state()
    assert state.step == 2
    listener = Listener()
    second = trainer(again, optimizer=optimizer, callbacks=[listener])
    second.engine.load_state(state)
    second.fit(batches[2:])
    assert same(state_of(again), state_of(once))
    assert [(s["step"], s["lr"], s["loss"]) for s in listener.steps] == [
        (s["step"], s["lr"], s["loss"]) for s in uninterrupted.steps[2:]
    ]
    assert second.engine.state().step == len(batches)


def test_state_is_what_a_callback_finds_in_the_plain_loop() -> None:
    taken: list[State] = []

    class Keeps(ps.Callback):
        def step(self, values: dict[str, float]) -> None:
            taken.append(kept.engine.state())

    kept = trainer(net(), callbacks=[Keeps()])
    kept.fit(vectors((6,) * 4))
    assert [state.step for state in taken] == [1, 2, 3, 4]
    assert {float(fields["step"]) for fields in taken[2].optimizer.values()} == {3.0}
    again = trainer(net())
    again.engine.load_state(taken[1])
    again.fit(vectors((6,) * 4)[2:])
    assert same(tensors(again.engine.state()), tensors(taken[3]))


@pytest.mark.parametrize(("strategy", "devices"), [("fill", 1), ("1f1b", 3)])
def test_pipelines_give_the_state_of_the_plain_loop(strategy: str, devices: int) -> None:
    """By the names of the unsplit model, so either goes on from the other's."""
    plain, piped = trainer(net()), trainer(net(), strategy, devices)
    for one in (plain, piped):
        one.fit(vectors((6,) * 3))
    expected, got = plain.engine.state(), piped.engine.state()
    assert got.step == expected.step == 3
    assert same(tensors(got), tensors(expected))
    assert got.optimizer.keys() == expected.optimizer.keys() == dict(plain.student.named_parameters()).keys()
    for name, fields in expected.optimizer.items():
        assert all(torch.equal(value, got.optimizer[name][key]) for key, value in fields.items())
    later = trainer(net(), strategy, devices)
    later.engine.load_state(got)
    with pytest.raises(PlanError, match="only 'reference' can go on from step 3 so far"):
        later.fit(vectors((6,)))


def test_a_run_after_another_begins_anew() -> None:
    fresh, used = trainer(net()), trainer(net())
    used.engine.load_state(fresh.engine.state())
    used.fit(vectors((6, 6)))
    state = used.engine.state()
    used.fit(vectors((6, 6)))
    assert used.engine.state().step == 2
    assert state.parameters["student.0.weight"] is not used.student[0].weight


def test_blockwise_state_has_everything_that_is_trained() -> None:
    def made() -> ps.Trainer:
        return ps.Trainer(BlockCase("thin").task(), strategy="reference", lr=0.01, device="cpu")

    data = [torch.randn(6, 6, dtype=torch.float64) for _ in range(2)]
    first, second = made(), made()
    first.fit(data)
    state = first.engine.state()
    assert {name.split(".")[0] for name in tensors(state)} == {"student", "output_projectors", "input_projectors"}
    second.engine.load_state(state)
    first.fit(data)
    second.fit(data)
    assert same(tensors(second.engine.state()), tensors(first.engine.state()))


def test_state_of_other_models_is_refused_before_anything_changes() -> None:
    state = trainer(net()).engine.state()
    other = trainer(distilled(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES), nn.Tanh()))
    before = state_of(other.task)
    with pytest.raises(ModelError) as error:
        other.engine.load_state(state)
    assert "'student.0.weight' is float32 (8, 4) in the state, expected float32 (6, 4)" in str(error.value)
    assert "the state has 'student.3.weight', which the models lack" in str(error.value)
    assert same(state_of(other.task), before)


def test_state_of_an_optimizer_is_a_copy_and_keeps_counters_on_the_cpu() -> None:
    parameter = nn.Parameter(torch.ones(2))
    first, second = (torch.optim.Adam([{"params": [parameter], "lr": lr}]) for lr in (0.1, 0.2))
    parameter.grad = torch.ones(2)
    first.step()
    saved = optimizer_state({"w": parameter}, first)
    load_optimizer_state({"w": parameter, "b": nn.Parameter(torch.ones(1))}, second, saved)
    assert second.param_groups[0]["lr"] == 0.2
    assert second.state[parameter]["step"] is not saved["w"]["step"]
    assert torch.equal(second.state[parameter]["exp_avg"], first.state[parameter]["exp_avg"])
