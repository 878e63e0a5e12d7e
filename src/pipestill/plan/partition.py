"""Partitions of a pipeline's models: which ones a user may give, and which ones are worth trying.

A partition is the number of consecutive blocks of each stage, such as (3, 2, 1) for six blocks on three devices.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pipestill.costs import Costs
from pipestill.errors import PlanError
from pipestill.plan.balance import balance
from pipestill.schedule.pipeline.structure import Demands


class Partitions(NamedTuple):
    """The blocks of each stage of both models; () for a teacher that is not there."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]


def partition_problems(costs: Costs, devices: int, student: Sequence[int] | None, teacher: Sequence[int] | None) -> list[str]:
    """Say what is wrong with partitions that a user or a file gives; one that is None is chosen later, so nothing is."""
    problems = []
    for role, partition, num_blocks in (("student", student, len(costs.student)), ("teacher", teacher, len(costs.teacher))):
        if partition is None or (num_blocks == 0 and not partition):
            continue
        shown = f"{role} partition {list(partition)}"
        if any(type(size) is not int for size in partition):
            problems.append(f"{shown} holds something else than whole numbers")
            continue
        if num_blocks == 0:
            problems.append(f"{shown} for a task without a {role}; leave it out")
        elif len(partition) != devices:
            problems.append(f"{shown} has {len(partition)} stages for {devices} devices")
        elif min(partition) < 1:
            problems.append(f"{shown} has an empty stage; every stage needs a block")
        if num_blocks and sum(partition) != num_blocks:
            problems.append(f"{shown} adds up to {sum(partition)}, but the {role} has {num_blocks} blocks")
    return problems


def momentum_problems(costs: Costs, student: Sequence[int], teacher: Sequence[int] | None) -> list[str]:
    """Say what is wrong with partitions of a student and a momentum teacher, whose blocks have to be on the same ranks."""
    tail = len(costs.student) - len(costs.teacher)
    if student[-1] <= tail:
        need = f"the last stage holds the {tail} blocks that the teacher lacks, and at least one block before them"
        return [f"student partition {list(student)}: {need}"]
    if teacher is not None and tuple(teacher) != _momentum_partition(costs, student):
        need = f"a momentum teacher's blocks are where the student's are, so it is {[*_momentum_partition(costs, student)]}"
        return [f"teacher partition {list(teacher)}: {need}; leave it out"]
    return []


def candidate_partitions(
    costs: Costs, devices: int, demands: Demands, strategy: str, microbatches: int, student_partition: Sequence[int] | None
) -> list[Partitions]:
    """Level partitions that are worth a simulation.

    They level both models together and, where the teacher runs first, each by itself. A momentum teacher's partition follows
    from the student's, which is `student_partition` if a user gave one.
    """
    if demands.momentum:
        student = _level_momentum(costs, devices, demands) if student_partition is None else tuple(student_partition)
        return [Partitions(student, _momentum_partition(costs, student))]
    path = (microbatches + devices - 1) / microbatches
    candidates = [level(costs, devices, demands, student_weight=path)]
    if strategy in ("gpipe", "1f1b") and costs.teacher:
        student_seconds, teacher_seconds = _block_seconds(costs, demands)
        candidates.append(Partitions(balance(student_seconds, [], devices)[0], balance(teacher_seconds, [], devices)[0]))
    return candidates


def level(costs: Costs, devices: int, demands: Demands, *, student_weight: float) -> Partitions:
    """The partitions of a student and a frozen teacher that level the work of both together (see `balance`)."""
    return Partitions(*balance(*_block_seconds(costs, demands), devices, student_weight=student_weight))


def _level_momentum(costs: Costs, devices: int, demands: Demands) -> tuple[int, ...]:
    """The student's partition that levels each block's work together with that of the teacher's block on the same rank.

    The blocks that the teacher lacks are at the student's end. They stay on the last rank, together with the block before
    them, so that every rank holds a block of the teacher.
    """
    student, teacher = _block_seconds(costs, demands)
    tail = len(student) - len(teacher)
    both = [s + t for s, t in zip(student, [*teacher, *[0.0] * tail], strict=True)]
    merged = [*both[: len(teacher) - 1], sum(both[len(teacher) - 1 :])]
    if len(merged) < devices:
        raise PlanError(
            f"{devices} devices, but the teacher has {len(merged)} blocks, and every stage holds one of these; "
            f"use at most {len(merged)} devices or cut the models into more blocks"
        )
    sizes = balance(merged, [], devices)[0]
    return (*sizes[:-1], sizes[-1] + tail)


def _momentum_partition(costs: Costs, student: Sequence[int]) -> tuple[int, ...]:
    """A momentum teacher's partition, which puts each of its blocks where the student's block is."""
    return (*student[:-1], student[-1] - (len(costs.student) - len(costs.teacher)))


def _block_seconds(costs: Costs, demands: Demands) -> tuple[list[float], list[float]]:
    """Seconds of each student block and each teacher block for one microbatch in all the views that the model sees."""
    student_views = sum(costs.views)
    teacher_views = sum(costs.views[: demands.teacher_views])
    student = [block.seconds * student_views for block in costs.student]
    student[-1] += costs.loss_seconds
    return student, [block.forward_seconds * teacher_views for block in costs.teacher]
