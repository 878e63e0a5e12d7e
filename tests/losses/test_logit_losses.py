"""Losses of logits: which tokens count, how the cross entropy is mixed in, padded vocabularies, and what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.divergences import by_definition, kl
from support.fits import Listener, unit_costs
from torch import Tensor

import pipestill as ps
from pipestill.errors import DataError
from pipestill.losses import LogitLoss

ALL: list[LogitLoss] = [
    ps.losses.SoftTarget(2.0, 0.3),
    ps.losses.ForwardKL(2.0),
    ps.losses.ReverseKL(2.0),
    ps.losses.JSD(0.3, 2.0),
    ps.losses.TotalVariation(2.0),
    ps.losses.TopKKL(2, 2.0),
    ps.losses.LogitsMSE(0.5),
]


def named(loss: LogitLoss) -> str:
    return type(loss).__name__


def words(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of (3 rows, 5 tokens, 7 words)."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 3, 5, 7, generator=generator)
    return student, teacher


LABELS = torch.tensor([[1, -100, 6, 0, -100], [-100, -100, -100, -100, -100], [2, 3, 4, 5, 6]])
TOKENS = torch.tensor([[1.0, 1, 0.5, 0, 0], [2, 0, 0, 0, 0], [0, 0, 0, 0, 1]])


@pytest.mark.parametrize("loss", ALL, ids=named)
def test_the_mean_is_over_the_tokens_that_count(loss: LogitLoss) -> None:
    student, teacher = words()
    each = loss.factors[0] * by_definition(loss, student, teacher)
    counts = LABELS != -100
    for target, weights in ((LABELS, counts.double()), ({"labels": LABELS, "tokens": TOKENS}, TOKENS.double())):
        parts = loss(student, teacher, target)
        assert parts[loss.part].item() == pytest.approx(float((each * weights).sum() / weights.sum()), rel=1e-6)
        assert loss.counts(target)[loss.part] == float(weights.sum())
        sums = loss.sums({"logits": student}, {"logits": teacher}, target)
        assert sums[loss.part].item() == pytest.approx(float((each * weights).sum()), rel=1e-6)
        assert parts.keys() == sums.keys() == loss.counts(target).keys()
    assert loss(student, teacher, None)[loss.part].item() == pytest.approx(float(each.mean()), rel=1e-6)
    assert loss.sums(student, teacher, None)[loss.part].item() == pytest.approx(float(each.mean()), rel=1e-6)
    assert loss.counts(None) == {}


def test_cross_entropy_is_that_of_torch() -> None:
    student, teacher = words()
    mixed = [
        (ps.losses.SoftTarget(), 1.0),
        (ps.losses.SoftTarget(2.0, 3.0, cross_entropy=0.5), 0.5),
        (ps.losses.JSD(0.1, kd_ratio=0.25), 0.75),
        (ps.losses.ForwardKL(cross_entropy=2.0), 2.0),
    ]
    for loss, factor in mixed:
        given = student.clone().requires_grad_()
        found = loss(given, teacher, LABELS)["cross_entropy"]
        exact = student.double().requires_grad_()
        expected = factor * F.cross_entropy(exact.flatten(0, 1), LABELS.flatten())
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        (one,), (other,) = torch.autograd.grad(found, given), torch.autograd.grad(expected, exact)
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-8)


def test_kd_ratio_is_convex() -> None:
    student, teacher = words()
    pure, mixed = ps.losses.ForwardKL(3.0), ps.losses.ForwardKL(3.0, kd_ratio=0.8)
    assert mixed(student, teacher, LABELS)["forward_kl"].item() == pytest.approx(
        0.8 * pure(student, teacher, LABELS)["forward_kl"].item()
    )
    assert list(ps.losses.SoftTarget(kd_ratio=1.0)(student, teacher, LABELS)) == ["soft_target"]
    only_labels = ps.losses.SoftTarget(kd_ratio=0.0)(student, teacher, LABELS)
    assert only_labels["soft_target"].item() == 0.0
    for loss in (lambda: ps.losses.SoftTarget(4.0, 0.2, kd_ratio=0.5), lambda: ps.losses.JSD(kd_ratio=0.5, cross_entropy=1.0)):
        with pytest.raises(ps.UserError, match="kd_ratio stands for weight and cross_entropy; give it, or them"):
            loss()


def test_without_the_squared_temperature() -> None:
    student, teacher = words()
    loss = ps.losses.JSD(0.3, 3.0, squared=False)
    assert 9 * loss(student, teacher, None)["jsd"].item() == pytest.approx(
        ps.losses.JSD(0.3, 3.0)(student, teacher, None)["jsd"].item()
    )


@pytest.mark.parametrize("loss", [*ALL, ps.losses.JSD(kd_ratio=0.5)], ids=named)
def test_rows_without_a_label_cost_nothing_and_are_no_nan(loss: LogitLoss) -> None:
    """A microbatch whose labels were all -100 once gave NaN and ended the run."""
    student, teacher = words()
    given = student.clone().requires_grad_()
    parts = loss(given, teacher, torch.full((3, 5), -100))
    assert {part.item() for part in parts.values()} == {0.0}
    sum(parts.values()).backward()  # type: ignore[union-attr]
    assert given.grad is not None and given.grad.abs().max() == 0.0


@pytest.mark.parametrize("loss", [*ALL, ps.losses.JSD(kd_ratio=0.5)], ids=named)
def test_sums_of_microbatches_are_the_sum_of_the_batch(loss: LogitLoss) -> None:
    student, teacher = (logits.double() for logits in words())
    target = {"labels": LABELS, "tokens": TOKENS}
    whole, counts = loss.sums(student, teacher, target), loss.counts(target)
    for part in whole:
        rows = [{name: values[i : i + 1] for name, values in target.items()} for i in range(3)]
        sums = [loss.sums(student[i : i + 1], teacher[i : i + 1], rows[i])[part].item() for i in range(3)]
        assert sum(sums) == pytest.approx(whole[part].item(), rel=1e-12)
        assert sum(loss.counts(row)[part] for row in rows) == counts[part]
        assert loss(student, teacher, target)[part].item() == pytest.approx(whole[part].item() / counts[part], rel=1e-12)


@pytest.mark.parametrize("loss", ALL, ids=named)
def test_classes_and_words_are_alike(loss: LogitLoss) -> None:
    student, teacher = words()
    flat = loss(student.flatten(0, 1), teacher.flatten(0, 1), LABELS.flatten())
    assert {n: p.item() for n, p in flat.items()} == {n: p.item() for n, p in loss(student, teacher, LABELS).items()}


def test_padding_does_not_count() -> None:
    """The divergence once counted padding, whose logits mean nothing."""
    student, teacher = words()
    spoilt = torch.where((LABELS == -100).unsqueeze(-1), 1e3 * torch.randn(3, 5, 7), student)
    for loss in ALL:
        one, other = loss(student, teacher, LABELS), loss(spoilt, teacher, LABELS)
        assert {n: p.item() for n, p in one.items()} == {n: p.item() for n, p in other.items()}


def test_vocabularies_with_other_padding_are_trimmed_or_refused() -> None:
    student, teacher = words()
    wide = torch.cat([teacher, torch.full((3, 5, 4), 50.0)], -1)
    for loss in ALL:
        kind, options = type(loss), {name: value for name, value in vars(loss).items() if name != "vocabulary"}
        for size in (7, 6):
            labels = torch.where(size > LABELS, LABELS, -100)
            expected = loss(student[..., :size], teacher[..., :size], labels)
            given = student.clone().requires_grad_()
            parts = kind(**options, vocabulary=size)(given, wide, labels)
            assert {n: p.item() for n, p in parts.items()} == {n: p.item() for n, p in expected.items()}
            sum(parts.values()).backward()  # type: ignore[union-attr]
            assert given.grad is not None and not given.grad[..., size:].any()
        with pytest.raises(
            ps.UserError,
            match=r"student \(3, 5, 7\) and teacher \(3, 5, 11\) differ in shape: vocabularies of 7 and 11; "
            r".* give the loss vocabulary=7, or len\(tokenizer\)",
        ):
            loss(student, wide, LABELS)
        with pytest.raises(ps.UserError, match="vocabulary is 8, but the student has 7 logits and the teacher 11"):
            kind(**options, vocabulary=8)(student, wide, LABELS)


def test_a_row_with_one_label_and_many_outputs_counts_once() -> None:
    """Feature maps are compared by their error, and the classes that the loader gives are only counted."""
    student, teacher = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    expected = F.mse_loss(student, teacher).item()
    assert ps.losses.LogitsMSE()(student, teacher, torch.tensor([3, 900]))["logits_mse"].item() == pytest.approx(expected)
    assert ps.losses.LogitsMSE()(student[0, 0, 0], teacher[0, 0, 0], None)["logits_mse"].item() == pytest.approx(
        F.mse_loss(student[0, 0, 0], teacher[0, 0, 0]).item()
    )
    first = ps.losses.LogitsMSE()(student, teacher, torch.tensor([3, -100]))["logits_mse"].item()
    assert first == pytest.approx(F.mse_loss(student[0], teacher[0]).item())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.long), r"labels are \(3, 4\), but the logits are of \(3, 5\) tokens"),
        (torch.zeros(3, dtype=torch.long), r"labels are \(3,\), but the logits are \(3, 5, 7\); expected a label for each token"),
        (torch.full((3, 5), 7), "labels go from 7 to 7; expected 0 to 6, or -100 where none counts"),
        (torch.full((3, 5), -1), "labels go from -1 to -1; expected 0 to 6"),
        ({"labels": torch.zeros(3, 5)}, "labels are torch.float32; expected class indices"),
        (torch.zeros(3, 5), r"the target is torch.float32 \(3, 5\); expected class indices, .* or a loss with cross_entropy=0"),
        ({"labels": LABELS, "tokens": torch.ones(3)}, r"tokens are \(3,\); expected a weight for each label, \(3, 5\)"),
    ],
)
def test_targets_that_do_not_fit_are_refused(target: Any, message: str) -> None:
    with pytest.raises(ps.UserError, match=message):
        ps.losses.SoftTarget()(*words(), target)


def test_outputs_without_logits_are_refused() -> None:
    student, teacher = words()
    with pytest.raises(ps.UserError, match="got a mapping of hidden; expected logits"):
        ps.losses.SoftTarget()({"hidden": student}, teacher, None)
    with pytest.raises(ps.UserError, match="got tuple; expected logits"):
        ps.losses.SoftTarget()(student, (teacher,), None)
    with pytest.raises(ps.UserError, match=r"logits are torch.int64 of \(2,\)"):
        ps.losses.SoftTarget()(torch.zeros(2, dtype=torch.long), teacher, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; expected more than 0"),
        ({"cross_entropy": -1}, "cross_entropy is -1; expected 0 or more"),
        ({"kd_ratio": 1.5}, "kd_ratio is 1.5; expected 1 or less"),
        ({"squared": 1}, "squared is 1; expected True or False"),
        ({"ignore_index": None}, "ignore_index is None; expected a whole number"),
        ({"vocabulary": 0}, "vocabulary is 0; expected at least 1"),
        ({"chunk_size": 0}, "chunk_size is 0; expected at least 1"),
        ({"beta": 1.5}, "beta is 1.5; expected 1 or less"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ps.UserError, match=message):
        ps.losses.JSD(**options)


def gkd(student: Tensor, teacher: Tensor, labels: Tensor, beta: float, temperature: float) -> Tensor:
    """TRL's loss of generalised knowledge distillation, from its formula: logits over T, no T^2, the mean over labels."""
    log_q, log_p = (torch.log_softmax(x / temperature, -1) for x in (student, teacher))
    if beta == 0:
        each = kl(log_p, log_q)
    elif beta == 1:
        each = kl(log_q, log_p)
    else:
        log_m = torch.logsumexp(torch.stack([log_q + torch.tensor(1 - beta).log(), log_p + torch.tensor(beta).log()]), 0)
        each = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    counts = labels != -100
    return each[counts].sum() / counts.sum()


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
def test_trains_as_the_formula_of_trl_does(beta: float) -> None:
    """The same losses, step by step, on one pair of tiny models and the same data."""
    torch.manual_seed(0)
    teacher = torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11))
    ids = torch.randint(11, (8, 6))
    labels = torch.where(torch.arange(6) <= 5 * torch.arange(8).unsqueeze(1) % 6, ids, -100)
    curves = []
    for loss in (
        lambda s, t: ps.losses.JSD(beta, 0.9, squared=False)(s, t, labels)["jsd"],
        lambda s, t: gkd(s, t, labels, beta, 0.9),
    ):
        torch.manual_seed(1)
        student = torch.nn.Sequential(torch.nn.Embedding(11, 4), torch.nn.Linear(4, 11))
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
        curves.append([])
        for _ in range(12):
            value = loss(student(ids), teacher(ids).detach())
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            curves[-1].append(value.item())
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0][-1] < 0.9 * curves[0][0]


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize(("beta", "fuse_heads"), [(0.5, True), (0.9, False)])
def test_a_pipeline_trains_as_the_formula_of_trl_does(beta: float, fuse_heads: bool) -> None:
    """A batch's loss is the mean over all its labels, as TRL has it with `num_items_in_batch`, with any microbatches."""
    torch.manual_seed(0)
    data = [torch.randint(11, (2, 8, 6)) for _ in range(6)]
    batches = [(ids, torch.where(torch.arange(6) <= 5 * torch.arange(8).unsqueeze(1) % 6, labels, -100)) for ids, labels in data]
    teacher = torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11))
    student = torch.nn.Sequential(torch.nn.Embedding(11, 4), torch.nn.Linear(4, 11))
    copied = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(copied.parameters(), lr=0.1)
    expected = []
    for ids, labels in batches:
        value = gkd(copied(ids), teacher(ids).detach(), labels, beta, 0.9)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        expected.append(value.item())
    task = ps.Distillation(teacher, student, ps.losses.JSD(beta, 0.9, squared=False), fuse_heads=fuse_heads)
    listener = Listener()
    options = {"optimizer": torch.optim.AdamW, "lr": 0.1, "log_every": 1, "costs": unit_costs(task), "device": "cpu"}
    ps.Trainer(task, microbatches=3, devices=2, callbacks=[listener], **options).fit(batches)
    assert [step["loss"] for step in listener.steps] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"label": torch.zeros(2, 3, dtype=torch.int64)}, "mapping of 'label'; expected one with 'labels'"),
        ({"tokens": torch.ones(2, 3)}, "expected one with 'labels', or a loss with cross_entropy=0"),
        ({"labels": torch.zeros(2, 3, dtype=torch.int64), "tokens": -torch.ones(2, 3)}, "a negative number or NaN"),
        ({"labels": torch.zeros(2, 3, dtype=torch.int64), "tokens": torch.full((2, 3), math.nan)}, "a negative number or NaN"),
    ],
)
def test_a_target_that_says_nothing_of_its_tokens_is_refused(target: Any, message: str) -> None:
    """A misspelt key made a mean over padding, without labels, and nothing was said."""
    logits = torch.randn(2, 3, 5)
    for use in (lambda loss: loss.counts(target), lambda loss: loss(logits, logits, target)):
        with pytest.raises(DataError, match=message):
            use(ps.losses.SoftTarget())
