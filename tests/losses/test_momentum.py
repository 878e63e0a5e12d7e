"""Losses of views against the formulas that they come from."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.outputs import STUDENT, TEACHER, softmax

from pipestill.losses import Dino, InfoNCE, byol


def test_dino_by_hand() -> None:
    """Cross entropies of all pairs of different views; the teacher's are centred by batches before."""
    loss = Dino(3, student_temperature=0.5, teacher_temperatures=(0.2, 0.4), warm_up_batches=2, center_momentum=0.75)
    students = [torch.randn(2, 3, generator=torch.Generator().manual_seed(view)) for view in range(3)]
    center = [0.0, 0.0, 0.0]
    mean = torch.cat([TEACHER, 2 * TEACHER]).mean(0).tolist()
    for temperature in (0.2, 0.3, 0.4, 0.4):
        entropies = []
        for j, teacher in enumerate((TEACHER, 2 * TEACHER)):
            for i, student in enumerate(students):
                for row in range(2):
                    t = softmax(teacher[row] - torch.tensor(center), temperature)
                    s = softmax(student[row], 0.5)
                    entropies += [-sum(a * math.log(b) for a, b in zip(t, s, strict=True))] if i != j else []
        parts = loss(students, (TEACHER, 2 * TEACHER), None)
        assert list(parts) == ["dino"]
        assert parts["dino"].item() == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
        center = [0.75 * c + 0.25 * m for c, m in zip(center, mean, strict=True)]
    assert loss.center.tolist() == pytest.approx(center)
    assert loss.batches == 4


def test_dino_outside_training_moves_nothing() -> None:
    loss = Dino(3).eval()
    loss((STUDENT, STUDENT), (TEACHER,), None)
    assert loss.center.tolist() == [0.0, 0.0, 0.0]
    assert loss.batches == 0
    assert loss.teacher_temperature().item() == pytest.approx(0.07), "no batches to warm up over"


def test_dino_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="center_momentum 1"):
        Dino(3, center_momentum=1.0)
    with pytest.raises(ValueError, match="student_temperature 0"):
        Dino(3, student_temperature=0.0)


def test_byol_by_hand() -> None:
    """Both pairs of different views, the mean over rows."""
    students, teachers = (STUDENT, 2 * STUDENT + 1), (TEACHER, TEACHER - 1)
    expected = sum(
        2 - 2 * float(s[row] @ t[row]) / float(s[row].norm() * t[row].norm())
        for s, t in ((students[0], teachers[1]), (students[1], teachers[0]))
        for row in range(2)
    )
    parts = byol(students, teachers, None)
    assert list(parts) == ["byol"]
    assert parts["byol"].item() == pytest.approx(expected / 2, rel=1e-5)


def test_info_nce_by_hand() -> None:
    """Each row of a student's view is told from the rows of the teacher's other view."""
    students, teachers, temperature = (STUDENT, STUDENT + 1), (TEACHER, TEACHER - 2), 0.5
    expected = 0.0
    for s, t in ((students[0], teachers[1]), (students[1], teachers[0])):
        for row in range(2):
            cosines = [float(F.cosine_similarity(s[row], t[other], dim=0)) for other in range(2)]
            expected += -math.log(softmax(torch.tensor(cosines), temperature)[row]) / 2
    parts = InfoNCE(temperature)(students, teachers, None)
    assert list(parts) == ["info_nce"]
    assert parts["info_nce"].item() == pytest.approx(2 * temperature * expected, rel=1e-5)
