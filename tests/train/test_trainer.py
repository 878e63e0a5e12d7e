"""The trainer: what it reports, what it refuses, what it leaves behind."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import CASES, Average, distilled, linears, supervised
from support.fits import Listener, unit_costs
from support.models import CLASSES, Stream, vectors
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pipestill as ps
from pipestill.costs import Costs
from pipestill.errors import ConfigError, DataError, DeviceError, ModelError, PlanError, TrainingError, UserError
from pipestill.train.callbacks import Callback
from pipestill.train.data import LoaderError


def task() -> ps.Distillation:
    torch.manual_seed(0)
    return distilled(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, CLASSES))


def trainer(of: Any = None, **options: Any) -> ps.Trainer:
    of = of or task()
    defaults: dict[str, Any] = {"costs": unit_costs(of), "microbatches": 2, "device": "cpu", "timeout_seconds": 20.0}
    return ps.Trainer(of, **{**defaults, **options})


class Diary(Callback):
    """Everything that a callback hears, in order."""

    def __init__(self) -> None:
        self.entries: list[Any] = []

    def start(self, description: str, total_steps: int | None) -> None:
        self.entries.append(("start", description, total_steps))

    def step(self, values: dict[str, float]) -> None:
        self.entries.append(("step", int(values["step"]), int(values["epoch"])))

    def validation(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        self.entries.append(("validation", step, epoch, sorted(metrics)))

    def end(self) -> None:
        self.entries.append("end")


@pytest.mark.parametrize(("strategy", "devices"), [("reference", 1), ("fill", 2)])
def test_what_callbacks_hear(strategy: str, devices: int) -> None:
    diary = Diary()
    metrics = {"accuracy": ps.losses.accuracy}
    made = trainer(strategy=strategy, devices=devices, log_every=2, callbacks=[diary], metrics=metrics)
    made.fit(vectors((6, 6, 6)), epochs=2, validate=vectors((5,)), description="words")
    assert diary.entries == [
        ("start", "words", 6),
        ("step", 2, 1), ("step", 3, 1), ("validation", 3, 1, ["accuracy"]),
        ("step", 4, 2), ("step", 6, 2), ("validation", 6, 2, ["accuracy"]),
        "end",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("loader", "fit", "total"),
    [
        (vectors((6, 6)), {"epochs": 3}, 6),
        (vectors((6, 6)), {}, 2),
        (vectors((6, 6)), {"epochs": 3, "steps": 4}, 4),
        (vectors((6, 6)), {"epochs": 1, "steps": 40}, 2),
        (vectors((6, 6)), {"steps": 5}, 5),
        (iter(vectors((6, 6))), {"epochs": 1}, None),
        (DataLoader(Stream(), batch_size=None), {"epochs": 1}, None),
        (DataLoader(Stream(), batch_size=None), {"steps": 2}, 2),
    ],
)
def test_how_many_steps_are_announced(loader: Any, fit: dict[str, int], total: int | None) -> None:
    diary = Diary()
    result = trainer(callbacks=[diary]).fit(loader, **fit)
    assert diary.entries[0] == ("start", "train", total)
    assert total is None or result.steps == total


@pytest.mark.parametrize(("strategy", "devices"), [("reference", 1), ("fill", 1), ("gpipe", 3)])
def test_metrics_are_means_over_all_rows(strategy: str, devices: int) -> None:
    """Of uneven batches and microbatches."""
    of, data = task(), vectors((7, 3, 1), seed=8)
    metrics = {"accuracy": ps.losses.accuracy, "largest": lambda output, target: output.max(-1).values.mean()}
    listener = Listener()
    made = trainer(of, strategy=strategy, devices=devices, metrics=metrics, callbacks=[listener], microbatches=3)
    result = made.fit(vectors((6,)), validate=data)
    assert all(module.training for module in of.student.modules())
    of.student.eval()
    outputs = torch.cat([of.student(x) for x, _ in data])
    targets = torch.cat([y for _, y in data])
    expected = {
        "accuracy": (outputs.argmax(-1) == targets).double().mean().item(),
        "largest": outputs.max(-1).values.mean().item(),
    }
    (_, _, reported), *more = listener.validations
    assert not more
    assert reported == pytest.approx(expected, rel=1e-6)
    assert result.metrics == {"loss": result.metrics["loss"], **reported}


@pytest.mark.parametrize(("strategy", "devices"), [("reference", 1), ("fill", 3)])
def test_what_a_result_says(strategy: str, devices: int) -> None:
    result = trainer(strategy=strategy, devices=devices).fit(vectors((6, 6, 5)), epochs=4)
    summary = result.summary()
    json.dumps(summary)
    assert (result.strategy, result.devices, result.steps, result.samples, result.staleness) == (
        strategy,
        devices,
        12,
        68,
        0,
    )
    assert result.seconds > 0 and result.seconds_per_step > 0
    assert 0 <= result.utilisation <= 1
    assert result.bubble == pytest.approx(1 - result.utilisation)
    assert len(result.peak_memory_bytes) == devices
    assert set(summary["versions"]) == {"pipestill", "torch", "python"}
    assert summary["samples_per_second"] == pytest.approx(68 / result.seconds)
    assert (result.plan is None) == (result.trace is None) == (strategy == "reference")


@pytest.mark.parametrize("strategy", ["reference", "fill"])
def test_logged_values(strategy: str) -> None:
    listener = Listener()
    made = trainer(strategy=strategy, lr=0.5, lr_schedule=lambda step: 0.5**step, log_every=1, callbacks=[listener])
    made.fit(vectors((6, 6)))
    assert [values["lr"] for values in listener.steps] == [0.5, 0.25]
    for values in listener.steps:
        assert values["loss"] == pytest.approx(values["soft_target"] + values["cross_entropy"])
        assert values["grad_norm"] > 0


def test_it_learns() -> None:
    losses = Listener()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    data = [(x, (x[:, 0] > 0).long())]
    made = trainer(supervised(*linears(4, 8, 2)), devices=2, lr=0.5, callbacks=[losses], log_every=1)
    made.fit(data, epochs=60)
    assert losses.steps[-1]["loss"] < 0.5 * losses.steps[0]["loss"]


def test_training_goes_on_where_it_stood() -> None:
    """Without momentum, two fits are one: nothing but the weights counts."""
    options: dict[str, Any] = {"lr": 0.2, "devices": 2}
    once, twice = task(), task()
    trainer(once, **options).fit(vectors((6, 6, 6, 6)))
    made = trainer(twice, **options)
    made.fit(vectors((6, 6, 6, 6))[:2])
    made.fit(vectors((6, 6, 6, 6))[2:])
    assert all(torch.equal(a, b) for a, b in zip(once.student.parameters(), twice.student.parameters(), strict=True))


def test_costs_are_measured_where_none_are_given() -> None:
    result = trainer(costs=None, devices=2).fit(vectors((6, 6)))
    assert result.plan is not None
    assert result.plan.costs.rows == 3
    assert all(block.forward_seconds > 0 for block in result.plan.costs.student)


def test_measuring_leaves_no_trace() -> None:
    """Buffers that a forward replaces, dropout's random numbers: the run is the same with and without it."""
    for case in ("new_buffers", "one_module_twice", "centered_loss"):
        given = CASES[case].run("fill", 2)
        measured = CASES[case].run("fill", 2, costs=None)
        assert all(torch.equal(tensor, given.state[name]) for name, tensor in measured.state.items())


def test_the_student_keeps_its_names_and_its_place() -> None:
    of = task()
    names, parameters = list(of.student.state_dict()), [id(p) for p in of.student.parameters()]
    made = trainer(of, devices=3)
    made.fit(vectors((6,)))
    assert made.student is of.student
    assert list(of.student.state_dict()) == names
    assert [id(p) for p in of.student.parameters()] == parameters
    assert all(p.grad is None and p.device.type == "cpu" for p in of.student.parameters())


def test_no_thread_is_left() -> None:
    trainer(devices=2).fit(vectors((6,) * 3), validate=vectors((6,) * 20))
    with pytest.raises(TrainingError):
        trainer().fit([(torch.full((4, 4), float("nan")), torch.zeros(4, dtype=torch.int64))] * 20)
    assert not [thread for thread in threading.enumerate() if thread.name == "pipestill-reader"]


def breaks(output: Tensor, target: Tensor) -> Tensor:
    raise ZeroDivisionError("metric")


@pytest.mark.parametrize(("strategy", "devices"), [("reference", 1), ("fill", 2)])
def test_metrics_that_are_not_tensors_and_metrics_that_fail(strategy: str, devices: int) -> None:
    def of(metric: Any) -> dict[str, float]:
        made = trainer(strategy=strategy, devices=devices, metrics={"m": metric})
        return made.fit(vectors((6,)), validate=vectors((4,) * 9)).metrics

    assert of(lambda output, target: 0.25)["m"] == 0.25
    with pytest.raises(ConfigError, match=r"metric 'm' gave a tensor of shape \(2, 5\); expected a scalar"):
        of(lambda output, target: output)
    with pytest.raises(ModelError, match="the metrics cannot take output .* ZeroDivisionError: metric"):
        of(breaks)
    assert not [thread for thread in threading.enumerate() if thread.name == "pipestill-reader"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strategy": "fil"}, ConfigError, "no strategy 'fil' .*did you mean 'fill'.*reference"),
        ({"devices": 0}, PlanError, "devices is 0; expected at least 1"),
        ({"microbatches": 0}, PlanError, "microbatches is 0"),
        ({"log_every": 0}, PlanError, "log_every is 0"),
        ({"strategy": "reference", "devices": 2}, PlanError, "'reference' runs on one device, not 2"),
        ({"device": "tpu"}, DeviceError, "no device type 'tpu'; expected cpu or cuda"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trainer(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_cuda_that_is_not_there() -> None:
    with pytest.raises(DeviceError, match="2 CUDA devices asked for, this machine has 0"):
        trainer(device="cuda", devices=2)


def tied() -> ps.Distillation:
    of = distilled(nn.Linear(4, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, CLASSES))
    of.student[3].weight = of.student[1].weight
    return of


GOOD = vectors((6, 6))


@pytest.mark.parametrize(
    ("make", "options", "loader", "error", "message"),
    [
        (task, {"devices": 5}, GOOD, PlanError, "the student has 4 blocks for 5 devices"),
        (
            task,
            {"devices": 2, "student_partition": (1, 1)},
            GOOD,
            PlanError,
            r"adds up to 2, but the student has 4 blocks",
        ),
        (task, {"devices": 2, "strategy": "gpipe", "run_ahead": 1}, GOOD, PlanError, "run_ahead is a knob of 'fill'"),
        (
            task,
            {"devices": 2, "costs": Costs.uniform(3, 1, 1, 1)},
            GOOD,
            PlanError,
            "costs are of 3 student and 3 teacher",
        ),
        (
            tied,
            {"devices": 2, "student_partition": (3, 2)},
            GOOD,
            ModelError,
            "'1.weight' .* is shared by student stages 0 and 1",
        ),
        (task, {}, [], DataError, "the loader gave no batch in epoch 0"),
        (task, {}, [(torch.zeros(3, 4), torch.zeros(2))], DataError, "batch 0 has 3 rows of inputs and 2 of targets"),
        (
            task,
            {},
            [(torch.zeros(3, 5), torch.zeros(3).long())],
            ModelError,
            r"block 0 \('0'\) cannot take float32\[2, 5\]",
        ),
        (task, {"devices": 2, "split_batch": lambda b: (b[0], None)}, GOOD, None, ""),
        (lambda: CASES["deep_teacher"].task(), {}, GOOD, None, ""),
    ],
)
def test_user_errors_come_before_the_first_step(
    make: Callable[[], Any], options: dict[str, Any], loader: Any, error: type[Exception] | None, message: str
) -> None:
    of, diary = make(), Diary()
    before = [p.detach().clone() for p in of.student.parameters()]
    made = trainer(of, callbacks=[diary], **options)
    if error is None:
        made.fit(loader)
        return
    with pytest.raises(error, match=message) as caught:
        made.fit(loader)
    assert isinstance(caught.value, UserError)
    assert diary.entries in ([], ["end"])
    assert all(torch.equal(a, b) for a, b in zip(before, of.student.parameters(), strict=True))


@pytest.mark.parametrize("fit", [{"epochs": 0}, {"steps": 0}, {"epochs": 2, "steps": -1}])
def test_no_epochs_or_steps(fit: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected at least 1"):
        trainer().fit(GOOD, **fit)


@pytest.mark.parametrize("devices", [1, 2])
def test_an_empty_validation_is_refused(devices: int) -> None:
    with pytest.raises(DataError, match="the loader gave no batch"):
        trainer(devices=devices).fit(GOOD, validate=[])


def test_callbacks_hear_the_end_of_a_run_that_fails() -> None:
    def broken() -> Any:
        yield from vectors((6,))
        raise OSError("gone")

    diary = Diary()
    with pytest.raises(LoaderError, match="the loader failed: OSError: gone"):
        trainer(devices=2, callbacks=[diary], log_every=1).fit(broken())
    assert diary.entries[-1] == "end"


def test_a_boundary_that_changes_during_training_is_refused() -> None:
    """Shapes that vary from batch to batch cannot cross: the receiver has to know them beforehand."""
    data = [(torch.randn(4, 3, 4), torch.zeros(4, dtype=torch.int64)), (torch.randn(4, 7, 4), torch.zeros(4).long())]
    of = supervised(nn.Linear(4, 8), nn.Tanh(), Mean(), nn.Linear(8, CLASSES))
    trainer(of, devices=1).fit(data)  # nothing crosses
    with pytest.raises(ModelError, match=r"was float32 \(2, 3, 8\) on the sample batch and is now float32 \(2, 7, 8\)"):
        trainer(of, devices=2, student_partition=(2, 2)).fit(data)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def test_preflight_finds_what_fit_would() -> None:
    trainer(devices=2).preflight(GOOD)
    with pytest.raises(PlanError, match="blocks for 9 devices"):
        trainer(devices=9).preflight(GOOD)
    with pytest.raises(ModelError, match="cannot take"):
        trainer().preflight([(torch.zeros(3, 5), torch.zeros(3).long())])


def test_preflight_refuses_the_same_without_assertions() -> None:
    """`python -O` leaves assertions out: nothing that checks what a user gave may be one, or be made by one."""
    said = []
    for flags in ([], ["-O"]):
        command = [sys.executable, *flags, "-m", "support.refusals"]
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path})
        said.append(done.stdout.splitlines())
    assert said[0] == said[1]
    assert [line.split(" ", 1)[1] for line in said[0][:3]] == ["accepted"] * 3
    assert all("Error " in line for line in said[0][3:])


def test_average_is_what_it_should_be() -> None:
    """The buffer that a forward replaces holds the steps of training, and no others."""
    of = supervised(nn.Linear(4, 8), Average(), nn.Linear(8, CLASSES))
    trainer(of, devices=2, costs=None).fit(vectors((6, 6, 6)))
    assert of.student[1].count.item() == 5  # 3 steps of 2 microbatches, counted from 0
