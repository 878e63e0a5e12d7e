"""Balance: divide both models' blocks into stages together, so that the work of the most loaded rank is least."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from pipestill.errors import PlanError


def balance(
    student_seconds: Sequence[float], teacher_seconds: Sequence[float], num_stages: int, *, student_weight: float = 1.0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the student's and the teacher's partition (blocks of each stage) with the least work on the most loaded rank.

    Stage i of both models sits on rank i, and has at least one block of each model. A rank's load is the sum of both models'
    seconds, or `student_weight` times the student's alone where that is more.

    The result is exact, by a dynamic programme over (stages, teacher blocks, student blocks): `worst[t, s]` is the least possible
    load of the most loaded rank when the ranks so far hold the first t and s blocks. It takes O(stages * teacher^2 * student^2).

    Args:
        student_seconds: seconds of each student block
        teacher_seconds: seconds of each teacher block; empty without a teacher
        num_stages: number of ranks
        student_weight: with M microbatches, (M + stages - 1) / M counts the student's own path through the pipeline, which no
            work of the teacher shortens

    Raises:
        PlanError: a model has fewer blocks than there are stages
    """
    for role, seconds in (("student", student_seconds), ("teacher", teacher_seconds)):
        if len(seconds) < num_stages and (role == "student" or seconds):
            raise PlanError(
                f"the {role} has {len(seconds)} blocks for {num_stages} devices; "
                f"use at most {len(seconds)} devices or cut the {role} into more blocks"
            )
    student = np.concatenate([[0.0], np.cumsum(student_seconds)])
    teacher = np.concatenate([[0.0], np.cumsum(teacher_seconds)])
    student_load = student[None, :] - student[:, None]  # [from, to]
    student_load[np.tril_indices(len(student))] = np.inf  # a stage has at least one student block
    least = 1 if teacher_seconds else 0
    worst = np.full((len(teacher), len(student)), np.inf)
    worst[0, 0] = 0.0
    choices = []
    for _ in range(num_stages):
        following = np.full_like(worst, np.inf)
        choice = np.zeros((*worst.shape, 2), dtype=np.int64)
        for before in np.flatnonzero(np.isfinite(worst).any(axis=1)):
            ends = np.arange(before + least, len(teacher))
            teacher_load = teacher[ends] - teacher[before]
            rank_load = np.maximum(student_load[None] + teacher_load[:, None, None], student_weight * student_load)
            load = np.maximum(worst[before][None, :, None], rank_load)
            start = load.argmin(axis=1)  # [end of teacher, end of student] -> where the student's stage starts
            value = np.take_along_axis(load, start[:, None, :], axis=1)[:, 0, :]
            better = value < following[ends]
            following[ends] = np.where(better, value, following[ends])
            choice[ends, :, 0] = np.where(better, before, choice[ends, :, 0])
            choice[ends, :, 1] = np.where(better, start, choice[ends, :, 1])
        worst = following
        choices.append(choice)
    path = [(len(teacher) - 1, len(student) - 1)]
    for choice in reversed(choices):
        before, start = choice[path[-1]]
        path.append((int(before), int(start)))
    path.reverse()
    teacher_sizes, student_sizes = (tuple(b[axis] - a[axis] for a, b in pairwise(path)) for axis in (0, 1))
    return student_sizes, teacher_sizes if teacher_seconds else ()
