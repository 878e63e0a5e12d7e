"""The trainer: what it reports, what it refuses, what it leaves behind."""

import importlib
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import refusals
from support.blocks import profile_of
from support.cases import CASES, Average, distilled, linears, supervised
from support.fits import Listener, unit_costs
from support.models import CLASSES, Stream, vectors
from support.without_asserts import without_assertions
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


def blockwise(**options: Any) -> ps.Trainer:
    models = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
    return ps.Trainer(ps.Blockwise(*models), **{"costs": profile_of(2), "device": "cpu", "timeout_seconds": 20.0, **options})


KINDS: dict[str, Callable[..., ps.Trainer]] = {"pipeline": trainer, "blockwise": blockwise}
EVERY_ENGINE = [("pipeline", "reference", 1), ("pipeline", "fill", 2), ("blockwise", "reference", 1), ("blockwise", "relay", 2)]
NAN = [(torch.full((4, 4), float("nan")), torch.zeros(4, dtype=torch.int64))]


class Diary(Callback):
    """Every call of a callback, in order."""

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


@pytest.mark.parametrize(("kind", "strategy", "devices"), EVERY_ENGINE)
def test_what_a_result_says(kind: str, strategy: str, devices: int) -> None:
    """The same names for every kind of task; callbacks count from 1."""
    diary = Diary()
    made = KINDS[kind](strategy=strategy, devices=devices, callbacks=[diary], log_every=4)
    result = made.fit(vectors((6, 6, 5)), epochs=4, description="words")
    summary = result.summary()
    json.dumps(summary)
    assert (result.strategy, result.devices, result.steps, result.samples) == (strategy, devices, 12, 68)
    assert (result.staleness, result.exact, result.whole_backwards) == (0, True, ())
    assert result.seconds > 0 and result.seconds_per_step > 0
    assert 0 <= result.utilisation <= 1
    assert result.bubble == pytest.approx(1 - result.utilisation)
    assert len(result.peak_memory_bytes) == devices
    assert set(summary["versions"]) == {"pipestill", "torch", "python"}
    assert summary["samples_per_second"] == pytest.approx(68 / result.seconds)
    assert summary.keys() >= {"seconds_per_step", "predicted_seconds_per_step", "limit_seconds_per_step", "metrics", "losses"}
    assert list(result.losses) == {"pipeline": ["soft_target", "cross_entropy"], "blockwise": ["0", "1"]}[kind]
    assert result.metrics["loss"] == pytest.approx(sum(result.losses.values()))
    alone = strategy == "reference"
    assert (result.plan is None) == (result.trace is None) == (result.traces == ()) == alone
    assert (result.predicted_seconds_per_step is None) == (result.limit_seconds_per_step is None) == alone
    assert diary.entries[0] == ("start", "words", 12 * made.engine.num_passes)
    assert diary.entries[-1] == "end"
    assert {entry[0] for entry in diary.entries[1:-1]} == {"step"}
    assert max(entry[1:] for entry in diary.entries[1:-1]) == (12, 4)


@pytest.mark.parametrize(("kind", "strategy", "devices"), EVERY_ENGINE)
@pytest.mark.parametrize("train", [True, False])
def test_models_are_given_back_in_the_modes_in_which_they_came(kind: str, strategy: str, devices: int, train: bool) -> None:
    """Each module by itself, also where the run has failed."""
    made = KINDS[kind](strategy=strategy, devices=devices)
    models = (made.task.teacher, made.task.student)
    for model in models:
        model.train(train)[1].train(not train)
    before = [module.training for model in models for module in model.modules()]
    made.fit(vectors((6, 6)))
    assert [module.training for model in models for module in model.modules()] == before
    with pytest.raises(TrainingError):
        made.fit(NAN)
    assert [module.training for model in models for module in model.modules()] == before


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_set_on_a_trainer_after_it_was_made(kind: str) -> None:
    made = KINDS[kind]()
    assert made.strategy == {"pipeline": "fill", "blockwise": "balanced"}[kind]
    for name in ("costs", "split_batch", "strategy", "engine", "spare_ranks"):
        with pytest.raises(AttributeError):
            setattr(made, name, None)


@pytest.mark.parametrize("kind", KINDS)
def test_plans_and_costs_are_those_of_a_run(kind: str) -> None:
    """What `measure` gives may be given, and `plan` gives what `fit` follows; neither trains."""
    data = vectors((6, 6))
    made = KINDS[kind](costs=KINDS[kind](costs=None, devices=2).measure(data), devices=2)
    before = [p.detach().clone() for p in made.student.parameters()]
    plan = made.plan(data)
    assert all(torch.equal(a, b) for a, b in zip(before, made.student.parameters(), strict=True))
    assert (plan, plan.num_devices) == (made.fit(data).plan, 2)
    assert KINDS[kind](strategy="reference").plan(data) is None


@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_no_plan_fits_into_is_refused_before_training(kind: str) -> None:
    with pytest.raises(PlanError, match="more than the 9.53674e-05 MiB|fits into 9.53674e-05 MiB a rank"):
        KINDS[kind](costs=None, devices=2, memory="100B").fit(vectors((6, 6)))
    assert KINDS[kind](costs=None, devices=2, memory="1GB").fit(vectors((6, 6))).steps == 2


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
    ("kind", "options", "error", "message"),
    [
        ("pipeline", {"strategy": "fil"}, ConfigError, "no strategy 'fil' for Distillation.*did you mean 'fill'.*reference"),
        ("pipeline", {"strategy": "hybrid"}, ConfigError, "no strategy 'hybrid' for Distillation; there are reference, seq"),
        ("pipeline", {"microbatches": 0}, PlanError, "microbatches is 0"),
        ("pipeline", {"costs": profile_of(2)}, ConfigError, "costs is BlockProfile.*; expected Costs"),
        ("pipeline", {"student_staleness": 1}, PlanError, "student_staleness is of 'reference', to emulate 'async'"),
        ("pipeline", {"strategy": "reference", "student_staleness": 2}, PlanError, "student_staleness is 2; expected 0 or 1"),
        ("blockwise", {"strategy": "relais"}, ConfigError, "no strategy 'relais' for Blockwise.*'relay'"),
        ("blockwise", {"strategy": "fill"}, ConfigError, "no strategy 'fill' for Blockwise"),
        ("blockwise", {"costs": profile_of(3)}, PlanError, "the costs are of 3 blocks, the models have 2"),
        ("blockwise", {"microbatches": 2, "metrics": {}}, ConfigError, "microbatches is for models .*; metrics is for models"),
        *(
            (kind, *rest)
            for kind in ("pipeline", "blockwise")
            for rest in (
                ({"devices": 0}, PlanError, "devices is 0; expected at least 1"),
                ({"log_every": 0}, PlanError, "log_every is 0"),
                ({"strategy": "reference", "devices": 2}, PlanError, "'reference' runs on one device, not 2"),
                ({"device": "tpu"}, DeviceError, "no device type 'tpu'; expected cpu or cuda"),
                ({"memory": "much"}, ConfigError, "expected memory such as 80GB"),
            )
        ),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(kind: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KINDS[kind](**options)


def test_blockwise_training_has_no_validation() -> None:
    with pytest.raises(ConfigError, match="Blockwise has no validation while it trains"):
        blockwise().fit(vectors((6,)), validate=vectors((6,)))


@pytest.mark.parametrize(("kind", "strategy", "devices"), EVERY_ENGINE)
def test_loaders_that_give_nothing_or_fail(kind: str, strategy: str, devices: int) -> None:
    """Callbacks are called at the end all the same, and no thread is left."""

    def broken() -> Any:
        yield from vectors((6,))
        raise OSError("gone")

    diary = Diary()
    made = KINDS[kind](strategy=strategy, devices=devices, callbacks=[diary], log_every=1)
    with pytest.raises(DataError, match="the loader gave no batch in epoch 0"):
        made.fit([])
    assert diary.entries == ["end"]
    if made.engine.num_readings == 1:
        with pytest.raises(LoaderError, match="the loader failed: OSError: gone"):
            made.fit(broken())
        assert diary.entries[-1] == "end"
    with pytest.raises(TrainingError):
        made.fit(NAN * 20)
    assert not [thread for thread in threading.enumerate() if thread.name == "pipestill-reader"]


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
        (task, {"devices": 2, "student_partition": (1, 1)}, GOOD, PlanError, r"adds up to 2, but the student has 4 blocks"),
        (task, {"devices": 2, "strategy": "gpipe", "run_ahead": 1}, GOOD, PlanError, "run_ahead is a knob of 'fill'"),
        (task, {"devices": 2, "costs": Costs.uniform(3, 1, 1, 1)}, GOOD, PlanError, "costs are of 3 student and 3 teacher"),
        (tied, {"devices": 2, "student_partition": (3, 2)}, GOOD, None, ""),
        (task, {}, [], DataError, "the loader gave no batch in epoch 0"),
        (task, {}, [(torch.zeros(3, 4), torch.zeros(2))], DataError, "batch 0 has 3 rows of inputs and 2 of targets"),
        (task, {}, [(torch.zeros(3, 5), torch.zeros(3).long())], ModelError, r"block 0 \('0'\) cannot take float32\[2, 5\]"),
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


def test_preflight_refuses_the_same_without_assertions(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -O` leaves assertions out: nothing that checks what a user gave may be one, or be made by one."""
    refusals.main()
    said = capsys.readouterr().out
    with without_assertions():
        worlds = importlib.import_module("pipestill.runtime.world")
        assert worlds.OneProcess(1).broadcast(None) is None, "this asserts that there is a value, where there are assertions"
        importlib.import_module("support.refusals").main()
    assert capsys.readouterr().out == said
    lines = [line.split(" ", 1)[1] for line in said.splitlines()]
    assert lines[:4] == ["accepted"] * 4
    assert all("Error " in line for line in lines[4:])


def test_average_is_what_it_should_be() -> None:
    """The buffer that a forward replaces holds the steps of training, and no others."""
    of = supervised(nn.Linear(4, 8), Average(), nn.Linear(8, CLASSES))
    trainer(of, devices=2, costs=None).fit(vectors((6, 6, 6)))
    assert of.student[1].count.item() == 5  # 3 steps of 2 microbatches, counted from 0
