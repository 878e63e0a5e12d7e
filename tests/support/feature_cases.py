"""Tasks that compare values inside the two models, one peculiarity each; they are among the cases of `support.cases`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipestill as ps
from support.models import CLASSES


def deep(*sizes: int) -> nn.Sequential:
    """Blocks 0, 1, ... of these sizes."""
    blocks = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(sizes)]
    return nn.Sequential(*[_Block(block) for block in blocks], nn.Linear(sizes[-1], CLASSES))


class _Block(nn.Module):
    """One block, where a bare `nn.Sequential` would be taken apart."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)  # type: ignore[no-any-return]


def between(teacher_block: int, student_block: int) -> ps.Distillation:
    """Three blocks each; one pair, with a projector."""
    student = nn.Sequential(_Block(nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3))), nn.Linear(6, 6), nn.Linear(6, CLASSES))
    pair = ps.features({str(teacher_block): str(student_block)}, ps.losses.Hint(), project=True, weight=0.7)
    return ps.Distillation(deep(4, 8, 8), student, ps.losses.SoftTarget(), features={"hint": pair})


def several_features() -> ps.Distillation:
    """Two terms, with pairs from the teacher's end to the student's start and back, one block compared three times."""
    student = deep(4, 6, 6, 6)
    terms = {
        "hidden": ps.features({"2": "0", "0": ["2", "1"]}, ps.losses.Hint(), project=True),
        "angle": ps.features({"1": "1", "3": "3"}, _cosine, weight=2.0, project=[nn.Linear(6, 8), nn.Identity()]),
    }
    return ps.Distillation(deep(4, 8, 8, 8), student, ps.losses.SoftTarget(), features=terms)


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def features_written_in_place() -> ps.Distillation:
    """Both models write to what is compared, right behind it."""
    teacher, student = (
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), last, nn.Linear(6, CLASSES))
        for last in (nn.LeakyReLU(0.1, inplace=True), nn.ELU(inplace=True))
    )
    pairs = {"0": "0", "2": "2"}
    return ps.Distillation(teacher, student, ps.losses.SoftTarget(), features=ps.features(pairs, ps.losses.Hint()))


def relations() -> ps.Distillation:
    """A loss that compares the rows of the whole batch."""
    term = ps.features({"0": "1"}, ps.losses.RKD(1.0, 2.0))
    return ps.Distillation(deep(4, 8, 8), deep(4, 6, 6), ps.losses.SoftTarget(), features=term, batch_loss=True)


class _Attends(nn.Module):
    """Gives attention maps beside hidden states; the next block reads the latter only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: Any) -> dict[str, Tensor]:
        hidden = x["hidden"] if isinstance(x, dict) else x.unflatten(-1, (4, 1)).expand(*x.shape, self.key.in_features)
        maps = (self.key(hidden) @ hidden.transpose(-1, -2)).softmax(-1).unsqueeze(1)
        return {"maps": maps, "hidden": self.value(maps[:, 0] @ hidden)}


class _Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.head(x["hidden"].mean(1))  # type: ignore[no-any-return]


def attention_maps() -> ps.Distillation:
    """Gradients come from the features alone for the maps, and from both sides for the hidden states."""
    teacher, student = (nn.Sequential(*[_Attends(width) for _ in range(3)], _Head(width)) for width in (5, 3))
    terms = {
        "maps": ps.features({"0": "1", "2": "2"}, ps.losses.AttentionMaps(), of="maps", weight=9.0),
        "hidden": ps.features({"1": "1"}, ps.losses.Hint(), project=True),
    }
    return ps.Distillation(teacher, student, ps.losses.SoftTarget(), features=terms)


class Contrast(nn.Module):
    """A loss with parameters and a buffer, as CRD has: an embedding of each model's values, and a memory that moves."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.of_student = nn.Linear(student, 3)
        self.of_teacher = nn.Linear(teacher, 3)
        self.memory: Tensor
        self.register_buffer("memory", torch.randn(7, 3))

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        ours, theirs = (F.normalize(x, dim=-1) for x in (self.of_student(student), self.of_teacher(teacher)))
        near, far = (ours * theirs).sum(-1), ours @ F.normalize(self.memory, dim=-1).T
        with torch.no_grad():
            self.memory = self.memory * 0.9 + theirs.mean(0) * 0.1  # another tensor, as some modules do
        return (far.logsumexp(-1) - near).mean()


def trained_losses() -> ps.Distillation:
    """The loss of the outputs is trained too."""
    features = ps.features({"1": "0"}, Contrast(6, 8))
    return ps.Distillation(deep(4, 8, 8), deep(4, 6, 6), Contrast(CLASSES, CLASSES), features=features)


def only_features() -> ps.Distillation:
    """The outputs count for nothing, so blocks behind the compared ones get no gradient."""
    term = ps.features({"0": "0", "2": "1"}, ps.losses.Hint(), project=True)
    return ps.Distillation(deep(4, 8, 8), deep(4, 6, 6, 6), lambda s, t, y: t.sum() * 0.0, features=term)


def two_teachers() -> ps.Distillation:
    """Teachers of two kinds, one after the other, both inside compared too."""
    teachers = [deep(4, 8, 8), nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Dropout(0.5), nn.Linear(3, CLASSES))]
    term = ps.features({"0.1": "1", "1.0": "0"}, ps.losses.Hint(), project=True)
    return ps.Distillation(teachers, deep(4, 6, 6), ps.losses.SoftTarget(), features=term, teacher_weights=[0.7, 0.4])


def tied_across_features() -> ps.Distillation:
    """A weight of blocks on both sides of a compared one."""
    student = deep(4, 6, 6, 6)
    student[2].inside[0].weight = student[1].inside[0].weight
    term = ps.features({"0": "1"}, ps.losses.Hint(), project=True)
    return ps.Distillation(deep(4, 8), student, ps.losses.SoftTarget(), features=term)


FEATURES = (
    several_features, features_written_in_place, relations, attention_maps, trained_losses, only_features, two_teachers,
)  # fmt: skip
