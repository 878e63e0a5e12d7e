"""The loss against what a cache keeps of a teacher is the one against the teacher itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pipestill as ps

ROWS, LENGTH, WORDS, K = 3, 5, 11, 4


def kept(teacher: Tensor, temperature: float, k: int = K, words: int = WORDS) -> dict[str, Tensor]:
    """What a cache keeps, made here in another way."""
    values, ids = teacher.double().topk(k, -1)
    rest = torch.ones_like(teacher, dtype=torch.bool).scatter(-1, ids, False)
    others = (teacher.double() / temperature).exp() * rest
    facts = torch.tensor([temperature, float(words)]).expand(*teacher.shape[:-1], 2)
    return {
        "teacher_values": values.float(), "teacher_ids": ids.int(), "teacher_tail": others.sum(-1).log(),
        "teacher_facts": facts,
    }  # fmt: skip


def logits(scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(ROWS, LENGTH, WORDS, generator=random) for _ in range(2))
    labels = torch.randint(WORDS, (ROWS, LENGTH), generator=random)
    labels[0, 2:] = -100
    labels[1] = -100
    return student, teacher, labels


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("options", [{}, {"kd_ratio": 0.3}, {"weight": 2.0, "cross_entropy": 0.5}])
@pytest.mark.parametrize("close", [False, True])
def test_loss_and_gradients_are_those_with_the_teacher(temperature: float, options: dict[str, float], close: bool) -> None:
    student, teacher, labels = logits()
    if close:
        teacher = student + 1e-3 * teacher
    found = []
    for loss, given, target in (
        (ps.losses.TopKKL(K, temperature, **options), (teacher,), {"labels": labels}),
        (ps.losses.CachedTopK(temperature, **options), (), {"labels": labels, **kept(teacher, temperature)}),
    ):
        leaf = student.clone().requires_grad_()
        parts = loss(leaf, *given, target)
        sum(parts.values()).backward()
        found.append((parts, leaf.grad, loss.counts(target), loss.sums(leaf, *given, target)))
    (ours, our_gradient, our_counts, our_sums), (theirs, their_gradient, their_counts, their_sums) = found
    assert our_counts == their_counts
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(their_sums[name], our_sums[name], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(their_gradient, our_gradient, rtol=1e-4, atol=1e-7)


def test_everything_kept_leaves_no_tail() -> None:
    student, teacher, labels = logits()
    target = {"labels": labels, **kept(teacher, 1.0, k=WORDS)}
    assert target["teacher_tail"].isneginf().all()
    expected = ps.losses.ForwardKL()(student, teacher, {"labels": labels})["forward_kl"]
    torch.testing.assert_close(ps.losses.CachedTopK()(student, target)["top_k_kl"], expected, rtol=1e-5, atol=0.0)


def test_classes_work_like_words() -> None:
    student, teacher, labels = (tensor[:, 0] for tensor in logits())
    expected = ps.losses.TopKKL(2)(student, teacher, labels)["top_k_kl"]
    found = ps.losses.CachedTopK()(student, {"labels": labels, **kept(teacher, 1.0, k=2)})["top_k_kl"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)


def test_a_student_with_more_words_says_how_many_are_read() -> None:
    student, teacher, labels = logits()
    target = {"labels": labels, **kept(teacher, 1.0)}
    padded = torch.cat([student, torch.full((ROWS, LENGTH, 2), 9.0)], -1)
    expected = ps.losses.CachedTopK()(student, target)["top_k_kl"]
    assert ps.losses.CachedTopK(vocabulary=WORDS)(padded, target)["top_k_kl"] == expected
    with pytest.raises(ps.UserError, match=r"is of 11 logits, and of the student's 13 are read 13; .* vocabulary=11"):
        ps.losses.CachedTopK()(padded, target)
    with pytest.raises(ps.UserError, match="write the cache with vocabulary=9"):
        ps.losses.CachedTopK()(student[..., :9], target)


def test_targets_of_another_temperature_or_without_a_cache_are_refused() -> None:
    student, teacher, labels = logits()
    target = {"labels": labels, **kept(teacher, 2.0)}
    for evaluate in (lambda: ps.losses.CachedTopK().counts(target), lambda: ps.losses.CachedTopK()(student, target)):
        with pytest.raises(
            ps.UserError, match=r"attached for temperature 2, and the loss has 1; give attach\(dataset, temperature=1\)"
        ):
            evaluate()
    with pytest.raises(ps.UserError, match="the targets lack teacher_values, .*TeacherCache"):
        ps.losses.CachedTopK()(student, {"labels": labels})
    with pytest.raises(ps.UserError, match="expected the same axes before the last"):
        ps.losses.CachedTopK()(student[:, :2], target | {"teacher_facts": target["teacher_facts"] / 2})


def test_padding_is_not_looked_at() -> None:
    student, teacher, labels = logits()
    target = {"labels": labels, **kept(teacher, 1.0)}
    expected = ps.losses.CachedTopK()(student, target)["top_k_kl"]
    nothing = {
        name: torch.where((labels == -100).view(*labels.shape, *[1] * (t.dim() - 2)), 0, t)
        for name, t in target.items()
        if t is not labels
    }
    assert ps.losses.CachedTopK()(student, {"labels": labels, **nothing})["top_k_kl"] == expected
