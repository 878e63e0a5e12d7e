"""Checks of what users give, and names that they know from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.cases import supervised
from support.models import CLASSES
from torch import nn

import pipestill as ps
from pipestill.arguments import _HINTS, hinted, mebibytes, parse_bytes
from pipestill.errors import ConfigError, UnknownArgument


def task() -> ps.Supervised:
    return supervised(nn.Linear(4, CLASSES))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("learning_rate", "Trainer has no argument 'learning_rate'; it is called `lr` here"),
        ("max_epochs", r"it is an argument of `fit`: trainer.fit\(loader, epochs=...\)"),
        ("num_train_epochs", r"trainer.fit\(loader, epochs=...\)"),
        ("max_grad_norm", "called `clip_grad_norm` here"),
        ("grad_clip", "called `clip_grad_norm` here"),
        ("gradient_accumulation_steps", "called `microbatches` here"),
        ("batch_size", r"it is the loader's: DataLoader\(..., batch_size=...\)"),
        ("device_ids", "called `devices` here: their number"),
        ("profile", r"called `costs` here: costs=BlockProfile.load\(...\)"),
        ("memory_bytes", "called `memory` here: bytes, or text such as '80GB'"),
        ("optimziers", "has no argument 'optimziers' .did you mean 'optimizer'"),
        ("weight_decay", 'optimizer_options={"weight_decay": ...}'),
        ("microbatchs", "has no argument 'microbatchs' .did you mean 'microbatches'"),
        ("zzz", "has no argument 'zzz'; there are task, optimizer, lr"),
    ],
)
def test_familiar_names_are_answered_with_ours(name: str, message: str) -> None:
    with pytest.raises(UnknownArgument, match=message) as error:
        ps.Trainer(task(), **{name: 1})
    assert isinstance(error.value, TypeError)
    assert isinstance(error.value, ps.UserError)


def test_all_unknown_names_are_answered_at_once() -> None:
    with pytest.raises(TypeError, match="'learning_rate'; it is called `lr` here; Trainer has no argument 'epochs'; it is an"):
        ps.Trainer(task(), learning_rate=0.1, epochs=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ps.Trainer(task()).fit([], max_epochs=3), "fit has no argument 'max_epochs'"),
        (lambda: ps.Trainer(task()).fit([], val_loader=[]), "called `validate` here"),
        (lambda: ps.Distillation(nn.ReLU(), nn.Tanh(), criterion=len), "Distillation .*'criterion'; it is called `loss` here"),
        (lambda: ps.Momentum(nn.ReLU(), nn.Tanh(), len, tau=0.9), "called `momentum` here"),
        (lambda: ps.Blockwise(nn.ReLU(), nn.Tanh(), adapters={}), "called `output_projectors` here"),
        (lambda: ps.Supervised(model=nn.ReLU(), loss=len), "called `student` here"),
    ],
)
def test_fit_and_tasks_answer_too(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnknownArgument, match=message):
        call()


def test_hints_name_arguments_that_are_there() -> None:
    @hinted
    def small(*, devices: int = 1) -> int:
        """Do nothing."""
        return devices

    assert small(devices=2) == 2
    assert small.__doc__ == "Do nothing."
    with pytest.raises(UnknownArgument, match="small has no argument 'learning_rate'; there are devices"):
        small(learning_rate=1)  # type: ignore[call-arg]
    assert not [name for name, hints in _HINTS.items() if not all(hints)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ps.losses.SoftTarget(T=2.0, alpha=0.5), "'T'; it is called `temperature`.*'alpha'; it is called `kd_ratio`"),
        (lambda: ps.losses.JSD(tau=2.0), "JSD has no argument 'tau'; it is called `temperature` here"),
        (lambda: ps.losses.Cosine(alpha=2.0), "Cosine has no argument 'alpha'; it is called `weight` here"),
        (lambda: ps.losses.TopKKL(top_k=3), "'top_k'; it is called `k` here"),
        (lambda: ps.losses.ForwardKL(vocab_size=3), "'vocab_size'; it is called `vocabulary` here"),
        (lambda: ps.losses.InfoNCE(temp=3), "'temp'; it is called `temperature` here"),
        (lambda: ps.losses.Dino(dim=3, out_dim=3), r"Dino has no argument 'out_dim' \(did you mean 'dim'"),
        (lambda: ps.losses.SoftTarget(temperatur=1.0), r"'temperatur' \(did you mean 'temperature'"),
    ],
)
def test_losses_answer_familiar_names_with_theirs(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnknownArgument, match=message):
        call()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("80GB", 80e9), ("1.5 MiB", 1.5 * 2**20), ("7", 7), (512, 512), (2.0, 2), ("2kb", 2000), ("3TiB", 3 * 2**40), ("9b", 9)
    ],
)  # fmt: skip
def test_amounts_of_memory_are_read(given: Any, expected: float) -> None:
    assert parse_bytes(given) == expected


@pytest.mark.parametrize("given", ["", "GB", "-1GB", "80XB", "0", 0, True, None, "1 2", "much"])
def test_what_is_no_amount_of_memory_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="expected memory such as 80GB or 512MiB, got"):
        parse_bytes(given)


def test_amounts_are_shown_in_mebibytes() -> None:
    assert mebibytes(3 * 2**19) == "1.5 MiB"
