"""What fails before training instead of in the middle of it."""

from typing import Any

import pytest
import torch
from support.cases import distilled, supervised
from support.models import CLASSES, vectors
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pipestill as ps
from pipestill.errors import ConfigError, ModelError, TrainingError
from pipestill.train.data import batch_sizes

X, Y = vectors((7,))[0]


def fit(task: Any, loader: Any, **options: Any) -> None:
    given = {"strategy": "reference", "device": "cpu", "microbatches": 2, "first_look": False, **options}
    ps.Trainer(task, **given).fit(loader)


def normed() -> ps.Supervised:
    return supervised(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))


@pytest.mark.parametrize(
    "loader", [DataLoader(TensorDataset(X, Y), batch_size=4), [(X[:4], Y[:4]), (X[:3], Y[:3])], [(X[:2], Y[:2])]]
)
def test_batch_norm_of_one_row_is_refused_before_training(loader: Any) -> None:
    with pytest.raises(ModelError, match=r"has some of one row, and batch norm in student block 1 \('1'\).*drop_last"):
        fit(normed(), loader)
    fit(normed(), loader, batch_norm="frozen")


def test_batch_norm_of_one_row_in_the_middle_of_a_run_is_no_bare_value_error() -> None:
    batches = [(X[:4], Y[:4]), (X[:3], Y[:3])]
    with pytest.raises(ModelError, match=r"batch 2 has a microbatch of one row, and batch norm in student block 1 \('1'\)"):
        fit(normed(), (batch for batch in batches))


def test_sizes_of_batches_that_are_known_beforehand() -> None:
    data = TensorDataset(X, Y)
    assert batch_sizes(DataLoader(data, batch_size=4), None) == {4, 3}
    assert batch_sizes(DataLoader(data, batch_size=4), 1) == {4}
    assert batch_sizes(DataLoader(data, batch_size=4, drop_last=True), None) == {4}
    assert batch_sizes(DataLoader(data, batch_size=9), None) == {7}
    assert batch_sizes([(X, Y), (X[:2], Y[:2])], 1) == {7}
    assert batch_sizes((batch for batch in [X]), None) == set()


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (torch.optim.SparseAdam, {}, "SparseAdam fails in its first step, .* student block 0 .* on cpu: Runtime"),
        (torch.optim.Adam, {"capturable": True}, "Adam fails in its first step, on the weights of student block 0"),
    ],
)
def test_optimizer_that_fails_at_its_first_step_is_refused_before_training(optimizer: Any, options: Any, message: str) -> None:
    task = distilled(nn.Linear(4, 8), nn.Linear(8, CLASSES))
    with pytest.raises(ConfigError, match=message):
        fit(task, [(X, Y)], optimizer=optimizer, optimizer_options=options)


def test_sparse_gradients_are_refused_with_the_block() -> None:
    task = supervised(nn.Embedding(11, 8, sparse=True), nn.Flatten(), nn.Linear(16, CLASSES))
    with pytest.raises(ModelError, match=r"student block 0 \('0'\) makes sparse gradients of '0.weight'.*sparse=False"):
        fit(task, [(torch.ones(4, 2).long(), Y[:4])])


def broken(where: str) -> tuple[ps.Distillation, Any]:
    def loss(student: Any, teacher: Any, target: Any) -> Any:
        value = ps.losses.LogitsMSE()(student, teacher, None)["logits_mse"]
        return value / (0.0 if where == "loss" and ps.step_number() else 1.0)

    task = ps.Distillation(
        nn.Sequential(nn.Linear(4, CLASSES), nn.Tanh()), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, CLASSES)), loss
    )
    if where == "teacher":
        with torch.no_grad():
            task.teacher[0].bias.fill_(float("nan"))
    if where == "student":
        with torch.no_grad():
            task.student[1].bias.fill_(float("inf"))
    return task, [(X, Y), (X * float("nan") if where == "data" else X, Y)]


@pytest.mark.parametrize(
    ("where", "advice"),
    [
        ("teacher", "step 1 .*the teacher's output is not finite, and the student's is: look at the teacher"),
        ("student", "step 1 .*the student's output is not finite: lower the learning rate.*the data is not to blame"),
        ("data", "step 2 .*they have only their inputs in common: look for NaN or infinity in the data"),
        ("loss", "step 2 .*so the loss itself makes it"),
    ],
)
def test_advice_for_a_loss_that_is_not_finite_follows_its_cause(where: str, advice: str) -> None:
    task, batches = broken(where)
    with pytest.raises(TrainingError, match=advice):
        fit(task, batches, lr=1e-6)


def test_advice_is_the_same_in_a_pipeline() -> None:
    task, batches = broken("teacher")
    with pytest.raises(TrainingError, match="look at the teacher"):
        fit(task, batches, strategy="1f1b", devices=2)
