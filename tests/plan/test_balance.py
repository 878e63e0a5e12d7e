"""Blocks -> stages, against trying every cut."""

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given, strategies as st

from pipestill.errors import PlanError
from pipestill.plan import balance


def cuts(num_blocks: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut blocks into stages that each hold at least one."""
    for inner in combinations(range(1, num_blocks), num_stages - 1):
        yield tuple(b - a for a, b in pairwise((0, *inner, num_blocks)))


def loads(seconds: Sequence[float], sizes: Sequence[int]) -> list[float]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [sum(seconds[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


def worst(
    student: Sequence[float], teacher: Sequence[float], student_cut: Sequence[int], teacher_cut: Sequence[int], weight: float
) -> float:
    """The most loaded rank."""
    own = loads(student, student_cut)
    others = loads(teacher, teacher_cut) if teacher else [0.0] * len(own)
    return max(max(a + b, weight * a) for a, b in zip(own, others, strict=True))


amounts = st.one_of(st.integers(0, 5).map(float), st.floats(0, 10))


@given(st.data(), st.integers(1, 4), st.booleans(), st.sampled_from([1.0, 1.5, 3.0]))
def test_no_cut_is_better(data: st.DataObject, num_stages: int, with_teacher: bool, weight: float) -> None:
    student = data.draw(st.lists(amounts, min_size=num_stages, max_size=7))
    teacher = data.draw(st.lists(amounts, min_size=num_stages, max_size=6)) if with_teacher else []
    student_cut, teacher_cut = balance(student, teacher, num_stages, student_weight=weight)
    assert (sum(student_cut), sum(teacher_cut)) == (len(student), len(teacher))
    assert len(student_cut) == num_stages and len(teacher_cut) == (num_stages if with_teacher else 0)
    assert min(student_cut) >= 1 and min(teacher_cut, default=1) >= 1
    assert all(type(size) is int for size in student_cut + teacher_cut)  # numpy's own would not become JSON
    best = min(
        worst(student, teacher, s, t, weight)
        for s in cuts(len(student), num_stages)
        for t in (cuts(len(teacher), num_stages) if with_teacher else [()])
    )
    assert worst(student, teacher, student_cut, teacher_cut, weight) == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_both_models_are_cut_together() -> None:
    """A rank with much of the one gets little of the other."""
    assert balance([1, 1, 1, 9], [9, 1, 1, 1], 2) == ((3, 1), (1, 3))


def test_the_students_own_path_counts() -> None:
    """With a heavy student weight, the student is level even where the sums then are not."""
    assert balance([4, 4], [1, 1, 6], 2, student_weight=1.0)[0] == (1, 1)
    student_cut, _ = balance([2, 2, 2, 2], [6, 0.1], 2, student_weight=1.0)
    assert student_cut == (1, 3)
    student_cut, _ = balance([2, 2, 2, 2], [6, 0.1], 2, student_weight=3.0)
    assert student_cut == (2, 2)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([1, 1], [1, 1, 1], "the student has 2 blocks for 3 devices; use at most 2 devices or cut the student"),
        ([1, 1, 1], [1, 1], "the teacher has 2 blocks for 3 devices; use at most 2 devices or cut the teacher"),
        ([], [], "the student has 0 blocks"),
    ],
)
def test_fewer_blocks_than_devices(student: list[float], teacher: list[float], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        balance(student, teacher, 3)


def test_many_blocks_take_little_time() -> None:
    """100 blocks of each on 16 ranks: the programme is polynomial (timeout of the test, not a measurement)."""
    student_cut, teacher_cut = balance([1.0] * 96, [1.0] * 96, 16)
    assert max(a + b for a, b in zip(student_cut, teacher_cut, strict=True)) == 12
