"""What a user of the Python API gets wrong: one `UserError` that says what was expected and what came, before any training."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import distilled
from support.fits import unit_costs
from support.models import CLASSES, vectors
from torch import Tensor, nn

import pipestill as ps
from pipestill.errors import ConfigError, DataError, ModelError, PipestillError, PlanError, UserError
from pipestill.optim import make_optimizer
from pipestill.train.callbacks import Callback, JsonLines, Output

NAN = float("nan")
DATA = vectors((6, 6))
X, Y = DATA[0]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def trainer(**options: Any) -> ps.Trainer:
    task = options.pop("task", None) or distilled(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    defaults = {"costs": unit_costs(task), "devices": 2, "microbatches": 2, "device": "cpu", "timeout_seconds": 20.0}
    return ps.Trainer(task, **{**defaults, **options})


def refused(make: Callable[[], Any], match: str, error: type[Exception] = UserError, **fit: Any) -> None:
    """Making or fitting is refused, and no weight has moved."""
    made = None
    with pytest.raises(error, match=match):
        made = make()
        before = copy.deepcopy(made.student.state_dict())
        made.fit(**{"loader": DATA, **fit})
    if made is not None:
        assert all(torch.equal(value, made.student.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": "2", "lr": None}, "devices is '2'; expected a whole number; lr is None; expected a number"),
        ({"devices": 2.5}, "devices is 2.5; expected a whole number"),
        ({"microbatches": True}, "microbatches is True; expected a whole number"),
        ({"log_every": NAN}, "log_every is nan; expected a whole number"),
        ({"strategy": 3}, "no strategy '3' for Distillation"),
        ({"batch_norm": 3}, "no batch norm policy '3'"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; expected a class such as torch.optim.SGD"),
        ({"optimizer": torch.optim.SGD(net().parameters())}, r"optimizer is SGD \( Parameter Group 0 .*; expected a class"),
        ({"optimizer": lambda p, lr: None}, "gave None; expected a torch.optim.Optimizer"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS computes the loss several times"),
        ({"lr": -1}, "lr is -1; expected 0 or more"),
        ({"lr": NAN}, "lr is nan; expected a finite number"),
        ({"lr": lambda step: 0.1}, r"lr is <function.*; expected a number, on which lr_schedule\(step\) is a factor"),
        ({"optimizer_options": {"lr": 1.0}}, "optimizer_options has a learning rate; give it as lr"),
        ({"optimizer_options": {"mass": 1}}, r"SGD\(parameters, lr=0.1, mass=1\) gives TypeError"),
        ({"param_groups": lambda p: None}, "the optimizer cannot be made"),
        ({"lr_schedule": 0.5}, "lr_schedule is 0.5; expected a function"),
        ({"lr_schedule": lambda: 1.0}, r"lr_schedule\(0\) failed: TypeError"),
        ({"lr_schedule": lambda step: "x"}, r"lr_schedule\(0\) is 'x'; expected a finite number, 0 or more"),
        ({"weight_decay_schedule": lambda step: NAN}, r"weight_decay_schedule\(0\) is nan"),
        ({"split_backward": "yes"}, "split_backward is 'yes'; expected True or False"),
        ({"stash": 2.5}, "stash is 2.5; expected a whole number"),
        ({"student_partition": 3}, "student_partition is 3; expected blocks of each stage"),
        ({"costs": {}}, "costs is {}; expected Costs"),
        ({"device": torch.device("cpu")}, r"device is device\(type='cpu'\); expected 'cpu', 'cuda' or None"),
        ({"metrics": {"loss": ps.losses.accuracy, "a": 3}}, "a metric is named 'loss'.*; metric 'a' is 3"),
        ({"split_batch": lambda item: item[0]}, "split_batch made float32.* of what the loader gave"),
        ({"length_axis": "1"}, "length_axis is '1'; expected a whole number"),
        ({"seed": None}, "seed is None; expected a whole number"),
        ({"callbacks": [print]}, "callback <built-in function print> is no object with the methods start, step"),
        ({"timeout_seconds": 0}, "timeout_seconds is 0; expected more than 0"),
        ({"strategy": "reference"}, "'reference' runs on one device, not 2; choose another, or devices=1"),
    ],
)  # fmt: skip
def test_trainers_argument_of_the_wrong_kind_is_no_type_error(options: dict[str, Any], message: str) -> None:
    refused(lambda: trainer(**options), message)


def test_wrong_counts_are_plan_errors() -> None:
    refused(lambda: trainer(devices="2"), "devices", PlanError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": None}, "devices is None; expected a whole number"),
        ({"costs": "x.csv"}, "costs is 'x.csv'; expected a BlockProfile"),
        ({"memory": "much"}, "expected memory such as 80GB or 512MiB, got 'much'"),
        ({"lr_schedule": lambda batch: NAN}, r"lr_schedule\(0\) is nan"),
    ],
)
def test_block_trainers_argument_of_the_wrong_kind_is_no_type_error(options: dict[str, Any], message: str) -> None:
    refused(lambda: ps.Trainer(ps.Blockwise(net(), net()), **{"device": "cpu", **options}), message)


@pytest.mark.parametrize("fit", [{"epochs": "2"}, {"epochs": 2.5}, {"steps": NAN}, {"steps": True}])
def test_number_of_epochs_that_is_no_whole_number_is_refused(fit: dict[str, Any]) -> None:
    refused(trainer, "expected a whole number", ConfigError, **fit)


def frozen() -> nn.Sequential:
    return net().requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ps.Distillation(None, nn.Linear, "kl"), "teacher is None.*; student is <class .*; the loss is 'kl'"),
        (lambda: ps.Supervised(net(), nn.CrossEntropyLoss), "the loss is the class CrossEntropyLoss; expected an object"),
        (lambda: ps.Momentum(net(), net(), ps.losses.byol, momentum="x", views=2.5), "views is 2.5.*; momentum is 'x'"),
        (lambda: ps.Blockwise(net(), frozen()), "no block has a parameter to train"),
        (lambda: ps.Blockwise(net(), net(), loss=3), "the loss is 3; expected a function"),
        (lambda: ps.Blockwise(net(), net(), loss=nn.Bilinear(8, 8, 1)), "the loss has parameters to train"),
        (lambda: ps.Blockwise(net(), net(), output_projectors={0: len}),
         r"output_projectors\[0\] is <built-in.*; expected an nn.Module"),
        (lambda: ps.Blockwise(net(), net(), candidates={0: net()[0]}), r"candidates\[0\] is Linear.*; expected a list"),
        (lambda: ps.Supervised(net(), len, student_cuts=[]).student_blocks, "Sequential has no block"),
        (lambda: ps.Supervised(net(), len, student_cuts="0").student_blocks, "cuts is '0'; expected a list of names"),
        (lambda: ps.Supervised(net(), len, student_cuts=[0]).student_blocks, "a cut of Sequential is 0"),
        (lambda: ps.Supervised(nn.Sequential(nn.LazyLinear(2)), len).student_blocks, r"without sizes \(0.weight"),
    ],
)  # fmt: skip
def test_task_of_the_wrong_parts_is_no_attribute_error(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make()


def test_something_else_than_a_task_is_refused() -> None:
    refused(lambda: ps.Trainer(None), "the task is None; expected one of Distillation, Momentum, Supervised", ConfigError)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda s, t, y: {"step": s.mean(), "b": s.mean()}, "parts of the loss are named 'step'"),
        (lambda s, t, y: {1: s.mean()}, "parts of the loss are named 1"),
        (lambda s, t, y: s.mean() * 1j, "a complex tensor of shape"),
    ],
)
def test_part_of_a_loss_does_not_overwrite_the_log(parts: Any, message: str) -> None:
    refused(lambda: trainer(task=ps.Distillation(net(), net(), parts)), message, ModelError)


@pytest.mark.parametrize("weight", ["x", NAN, -1, None])
def test_weight_of_a_loss_is_a_number(weight: Any) -> None:
    for kind in (ps.losses.SoftTarget, ps.losses.LogitsMSE, ps.losses.Cosine):
        with pytest.raises(ConfigError, match="weight is"):
            kind(weight=weight)
    with pytest.raises(ConfigError, match="temperature is"):
        ps.losses.InfoNCE(temperature=0)


def test_optimizer_of_other_parameters_trains_nothing_in_silence() -> None:
    parameters = dict(net().named_parameters())
    made = {"lr": 0.1, "options": {}}
    with pytest.raises(ConfigError, match="leaves out '0.bias', '2.weight', '2.bias'; param_groups must give exactly"):
        make_optimizer(torch.optim.SGD, parameters, param_groups=lambda p: [{"params": [p["0.weight"]]}], **made)
    stranger = nn.Parameter(torch.zeros(1))
    with pytest.raises(ConfigError, match="has 1 of somewhere else"):
        make_optimizer(torch.optim.SGD, parameters, param_groups=lambda p: [*p.values(), stranger], **made)


# ---------------------------------------------------------------- loaders


@pytest.mark.parametrize("strategy", ["fill", "reference"])
@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (None, "the loader is None; expected an iterable of batches"),
        (list, "the loader is <class 'list'>; expected an iterable"),
        ([X, (X, Y)], "batch 1 of epoch 0 has targets int64.*, and the first batch had None"),
        ([(X, Y), (X.double(), Y)], "batch 1 of epoch 0 has inputs float64.*, and the first batch had float32"),
        ([(X, Y), ({"x": X}, Y)], r"batch 1 of epoch 0 has inputs \{x: float32"),
        ([{"x": X, "y": Y}], "a pair is .inputs, targets. and all else is inputs: see split_batch"),
    ],
)
def test_targets_that_appear_later_are_not_dropped(strategy: str, loader: Any, message: str) -> None:
    devices = 2 if strategy == "fill" else 1
    with pytest.raises(UserError, match=message):
        trainer(devices=devices, strategy=strategy).fit(loader)


def test_generator_serves_one_epoch_only_and_is_told_before_it() -> None:
    refused(trainer, "the loader is a generator, which can be read once only, and it is to be read 2 times",
            DataError, loader=(batch for batch in DATA), epochs=2)  # fmt: skip
    blocks = ps.Trainer(ps.Blockwise(net(), net()), strategy="reference", device="cpu")
    refused(lambda: blocks, "is to be read 3 times", DataError, loader=(batch for batch in DATA))


@pytest.mark.parametrize(
    ("validate", "metric", "message"),
    [
        (3, ps.losses.accuracy, "the validation loader is 3"),
        ([(torch.zeros(6, 5), Y)], ps.losses.accuracy, r"validation: student block 0 \('0'\) cannot take float32\[3, 5\]"),
        ([X], ps.losses.accuracy, "the batch's targets: .* int64 .* is now None"),
        (DATA, lambda output: 0.0, "the metrics cannot take output float32.*TypeError"),
        (DATA, lambda output, target: "x", "metric 'm' gave 'x'; expected a scalar"),
    ],
)
def test_validation_that_cannot_be_is_refused_before_training(validate: Any, metric: Any, message: str) -> None:
    refused(lambda: trainer(metrics={"m": metric}), message, validate=validate)


def test_validation_by_views_is_refused_before_training() -> None:
    student = net()
    task = ps.Momentum(copy.deepcopy(student), student, ps.losses.byol)
    views = [((X, X), Y)]
    refused(lambda: trainer(task=task), "one view of each sample is validated, not all", ModelError,
            loader=views, validate=views)  # fmt: skip


def test_generator_may_validate_one_epoch() -> None:
    result = trainer(metrics={"accuracy": ps.losses.accuracy}).fit(DATA, validate=(batch for batch in DATA))
    assert "accuracy" in result.metrics


def test_empty_loader_is_no_stop_iteration_before_the_run() -> None:
    with pytest.raises(DataError, match="the loader gave no batch"):
        trainer().preflight([])


# ---------------------------------------------------------------- callbacks and files


class Breaks(Callback):
    def __init__(self, where: str) -> None:
        self.where, self.ended = where, False

    def step(self, values: dict[str, float]) -> None:
        if self.where == "step":
            raise OSError("first cause")

    def end(self) -> None:
        self.ended = True
        raise OSError("in the end")


@pytest.mark.parametrize(("where", "message"), [("step", "first cause"), ("end", "in the end")])
def test_failure_in_the_end_does_not_hide_the_first_cause(where: str, message: str) -> None:
    callbacks = [Breaks(where), Breaks("end")]
    with pytest.raises(OSError, match=message):
        trainer(callbacks=callbacks, log_every=1).fit(DATA)
    assert all(callback.ended for callback in callbacks)


class FullDisk:
    """A file that takes ten bytes more, and then none."""

    def __init__(self, file: Any) -> None:
        self.file, self.room = file, 10

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        part, self.room = data[: self.room], 0
        return int(self.file.write(part))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.start("train", 2)
    log.step({"step": 1, "loss": 0.5})
    log._file = FullDisk(log._file)
    with pytest.raises(OSError, match="No space left"):
        log.step({"step": 2, "loss": 0.25})
    log.end()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [{"step": 1, "loss": 0.5}]


def test_closed_output_is_told_as_such() -> None:
    class Gone:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    with pytest.raises((PipestillError, BrokenPipeError)) as caught:
        Output(file=Gone()).print("line")
    assert not isinstance(caught.value, BrokenPipeError) or not hasattr(Output.__mro__[1], "on_broken_pipe")


def test_momentum_that_cannot_be_is_refused_before_training() -> None:
    student = net()
    task = ps.Momentum(copy.deepcopy(student), student, ps.losses.byol, momentum=lambda step: 2.0)
    views: list[tuple[tuple[Tensor, Tensor], Tensor]] = [((X, X), Y)]
    refused(lambda: trainer(task=task), r"momentum\(0\) is 2.0; expected 1 or less", ConfigError, loader=views)
