"""Losses of values inside two models."""

import pytest
import torch
import torch.nn.functional as F

import pipestill as ps
from pipestill.errors import ConfigError

torch.manual_seed(0)
STUDENT, TEACHER = torch.randn(4, 3, 6), torch.randn(4, 3, 6)
LABELS = torch.tensor([[1, -100, 2], [-100, -100, -100], [0, 1, 2], [-100, 5, -100]])


def test_a_hint_is_the_mean_over_tokens_that_count() -> None:
    loss = ps.losses.Hint()
    torch.testing.assert_close(loss(STUDENT, TEACHER, None), F.mse_loss(STUDENT, TEACHER))
    counted = LABELS != -100
    torch.testing.assert_close(loss(STUDENT, TEACHER, LABELS), F.mse_loss(STUDENT[counted], TEACHER[counted]))
    weights = torch.rand(4, 3)
    expected = ((STUDENT - TEACHER).square().mean(-1) * weights).sum() / weights.sum()
    torch.testing.assert_close(loss(STUDENT, TEACHER, {"labels": LABELS, "tokens": weights}), expected)
    assert loss(STUDENT, TEACHER, torch.full((4, 3), -100)) == 0.0
    assert loss.counts(LABELS) == 6.0


def test_counts_of_rows_add_up() -> None:
    loss = ps.losses.Hint(normalise=True)
    parts = [loss.sums(STUDENT[i : i + 1], TEACHER[i : i + 1], LABELS[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(sum(parts) / loss.counts(LABELS), loss(STUDENT, TEACHER, LABELS))


def test_a_label_for_each_row_counts_rows() -> None:
    labels = torch.tensor([1, -100, 0, 3])
    kept = labels != -100
    torch.testing.assert_close(ps.losses.Hint()(STUDENT, TEACHER, labels), F.mse_loss(STUDENT[kept], TEACHER[kept]))


def test_attention_maps_of_other_heads_are_averaged() -> None:
    student, teacher = torch.rand(2, 2, 3, 3), torch.rand(2, 4, 3, 3)
    loss = ps.losses.AttentionMaps()
    torch.testing.assert_close(loss(student, teacher, None), F.mse_loss(student.mean(1), teacher.mean(1)))
    torch.testing.assert_close(loss(student, teacher[:, :2], None), F.mse_loss(student, teacher[:, :2]))
    with pytest.raises(ValueError, match=r"attention maps are \(rows, heads, queries, keys\)"):
        loss(student[0], teacher, None)


def test_attention_transfer_compares_where_models_look() -> None:
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    loss = ps.losses.AttentionTransfer()
    maps = [F.normalize(x.square().mean(1).flatten(1), dim=1) for x in (student, teacher)]
    torch.testing.assert_close(loss(student, teacher, None), F.mse_loss(*maps))
    assert loss(3 * student, student, None) < 1e-12, "only where, not how much"


def test_relations_do_not_change_with_scale_and_rotation() -> None:
    values = torch.randn(5, 4)
    turned = 3 * values @ torch.linalg.qr(torch.randn(4, 4)).Q
    parts = ps.losses.RKD()(values, turned, None)
    assert set(parts) == {"distance", "angle"}
    assert all(float(part) < 1e-6 for part in parts.values())
    other = ps.losses.RKD(distance=1.0, angle=0.0)(values, torch.randn(5, 7), None)
    assert set(other) == {"distance"}
    with pytest.raises(ConfigError, match="distance and angle are both 0"):
        ps.losses.RKD(0.0, 0.0)
    with pytest.raises(ValueError, match="1 rows of the student and 1 of the teacher; expected as many, at least 2"):
        ps.losses.RKD()(values[:1], values[:1], None)


def test_relations_of_equal_rows_have_finite_gradients() -> None:
    values = torch.zeros(3, 4, requires_grad=True)
    total = sum(ps.losses.RKD()(values, torch.randn(3, 4), None).values())
    assert isinstance(total, torch.Tensor)
    total.backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
