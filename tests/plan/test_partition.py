"""Partitions that are worth trying, and what is wrong with those given by hand."""

import pytest

from pipestill.costs import BlockCosts, Costs
from pipestill.errors import PlanError
from pipestill.plan.partition import Partitions, candidate_partitions, level, momentum_problems, partition_problems
from pipestill.schedule.pipeline.structure import Demands

SIX_AND_FIVE = Costs(tuple(BlockCosts(f"s{i}", 1.0, 2.0) for i in range(6)), tuple(BlockCosts(f"t{i}", 1.0) for i in range(5)))
MOMENTUM = Demands(momentum=True)


def test_the_students_own_path_counts() -> None:
    """The student's second block is long: levelled by its own path alone it is by itself."""
    costs = Costs(
        tuple(BlockCosts(f"s{i}", f, 2.0 * f) for i, f in enumerate((1.0, 3.0, 1.0))),
        tuple(BlockCosts(f"t{i}", 9.0) for i in range(2)),
    )
    assert level(costs, 2, Demands(), student_weight=1.0).teacher == (1, 1)
    assert level(costs, 2, Demands(), student_weight=100.0).student in ((1, 2), (2, 1))


def test_where_the_teacher_runs_first_each_model_is_levelled_alone_too() -> None:
    found = candidate_partitions(SIX_AND_FIVE, 2, Demands(), "1f1b", 4, None)
    assert len(found) == 2 and all(sum(student) == 6 and sum(teacher) == 5 for student, teacher in found)
    assert len(candidate_partitions(SIX_AND_FIVE, 2, Demands(), "fill", 4, None)) == 1
    assert len(candidate_partitions(Costs(SIX_AND_FIVE.student), 2, Demands(), "1f1b", 4, None)) == 1


def test_a_momentum_teacher_follows_the_student() -> None:
    """The block that it lacks is at the student's end, behind one that it has."""
    (found,) = candidate_partitions(SIX_AND_FIVE, 3, MOMENTUM, "fill", 4, None)
    assert found.teacher == (*found.student[:-1], found.student[-1] - 1)
    assert candidate_partitions(SIX_AND_FIVE, 3, MOMENTUM, "fill", 4, [1, 2, 3]) == [Partitions((1, 2, 3), (1, 2, 2))]
    with pytest.raises(PlanError, match="6 devices, but the teacher has 5 blocks"):
        candidate_partitions(SIX_AND_FIVE, 6, MOMENTUM, "fill", 4, None)


def test_problems_name_the_partition_and_the_numbers() -> None:
    assert partition_problems(SIX_AND_FIVE, 3, None, None) == []
    assert partition_problems(SIX_AND_FIVE, 3, (2, 2, 2), (1, 2, 2)) == []
    assert partition_problems(SIX_AND_FIVE, 2, (5, 2), None) == [
        "student partition [5, 2] adds up to 7, but the student has 6 blocks"
    ]
    assert len(partition_problems(SIX_AND_FIVE, 2, (6,), (9, -4))) == 2, "all at once"


def test_problems_of_a_momentum_teacher() -> None:
    assert momentum_problems(SIX_AND_FIVE, (2, 2, 2), None) == []
    assert "so it is [2, 2, 1]; leave it out" in momentum_problems(SIX_AND_FIVE, (2, 2, 2), (1, 2, 2))[0]
    assert "the last stage holds the 1 blocks" in momentum_problems(SIX_AND_FIVE, (3, 2, 1), None)[0]
