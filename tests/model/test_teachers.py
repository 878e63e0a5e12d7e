"""Several teachers as one model."""

import pytest
import torch
from support.feature_cases import deep
from torch import nn

import pipestill as ps
from pipestill.errors import ModelError
from pipestill.model.dry_run import dry_run
from pipestill.model.teachers import teachers_blocks

X, Y = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])


def test_blocks_of_one_teacher_come_after_those_of_the_other() -> None:
    models = [deep(4, 8), nn.Sequential(nn.Linear(4, 5), nn.Tanh())]
    blocks = teachers_blocks(models, None)
    assert [block.name for block in blocks.blocks] == ["0.0", "0.1", "1.0", "1.1"]
    outputs = blocks(X).outputs
    assert all(torch.equal(got, model(X)) for got, model in zip(outputs, models, strict=True))
    assert set(blocks.parameters_of(range(2, 3))) == {"models.1.0.weight", "models.1.0.bias"}


def test_the_loss_is_the_weighted_sum() -> None:
    torch.manual_seed(0)
    teachers, student, loss = [deep(4, 8), deep(4, 3)], deep(4, 6), ps.losses.SoftTarget()
    task = ps.Distillation(teachers, student, loss, teacher_weights=[0.25, 2.0])
    parts = task.loss_parts([student(X)], [task.teacher_blocks(X)], Y)
    assert list(parts) == ["teacher_0.soft_target", "teacher_0.cross_entropy", "teacher_1.soft_target", "teacher_1.cross_entropy"]
    expected = sum(w * sum(loss.sums(student(X), t(X), Y).values()) for w, t in zip([0.25, 2.0], teachers, strict=True))
    torch.testing.assert_close(sum(parts.values()), expected)
    assert task.loss_counts(Y) == dict.fromkeys(parts, 4.0)
    assert dry_run(task, X, Y).loss_parts == tuple(parts)


def test_each_teacher_counts_alike_by_default() -> None:
    student = deep(4, 6)
    one, two = (ps.Distillation([deep(4, 8)] * n, student, lambda s, t, y: s.mean()) for n in (1, 2))
    assert list(one.loss_parts([student(X)], [one.teacher_blocks(X)], Y)) == ["teacher_0"]
    torch.testing.assert_close(two.loss_parts([student(X)], [two.teacher_blocks(X)], Y)["teacher_1"], student(X).mean() / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": []}, "teacher is an empty list; expected at least one model"),
        ({"teacher": [deep(4, 8), 3]}, "teacher 1 is 3; expected an nn.Module"),
        ({"teacher_weights": [1.0]}, "there are 2 teachers and 1 teacher_weights; expected one for each"),
        ({"teacher_weights": [1.0, -1.0]}, r"teacher_weights\[1\] is -1.0; expected 0 or more"),
        ({"teacher": deep(4, 8), "teacher_weights": [1.0]}, "teacher_weights is of a list of teachers, and there is one"),
    ],
)
def test_what_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ps.Distillation(**{"teacher": [deep(4, 8), deep(4, 8)], "student": deep(4, 6), "loss": ps.losses.SoftTarget(), **options})  # type: ignore[arg-type]


def test_cuts_are_those_of_each_teacher() -> None:
    with pytest.raises(ModelError, match="there are 2 teachers and 1 teacher_cuts"):
        teachers_blocks([deep(4, 8), deep(4, 8)], [None])
