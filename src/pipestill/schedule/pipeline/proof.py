"""What only a pipeline's check proves: weight versions, and the bounds on stashed microbatches and on the teacher's run-ahead."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.pipeline.step import PipelineStep
from pipestill.schedule.structure import Proof, Versions

_READS_WEIGHTS = (Op.FORWARD, Op.BACKWARD, Op.INPUT, Op.WEIGHT)


def prove(
    rows: Sequence[Sequence[Action]], structure: PipelineStep, num_steps: int, stash: Sequence[int], run_ahead: int
) -> Proof:
    """The weight versions, stash and run-ahead of unrolled rows, and where they are not what is declared."""
    versions, problems = _versions(rows, structure)
    peaks, most_ahead, bound_problems = _bounds(rows, structure, stash, run_ahead)
    moving = [v.student + (v.teacher if structure.momentum else ()) for v in versions]
    staleness = max((v.step - used for v, read in zip(versions, moving, strict=True) for used in read), default=0)
    return Proof((*problems, *bound_problems), versions[:num_steps], peaks, most_ahead, staleness)


def _versions(rows: Sequence[Sequence[Action]], structure: PipelineStep) -> tuple[tuple[Versions, ...], list[str]]:
    """The versions that each step's forwards read, and where they are not what the structure declares.

    Step k reads student version k, and a teacher version of 0 when it is frozen, of k when it moves; less the declared
    staleness. A backward runs on the version its forward read. A stage keeps as many old versions of the student's
    weights as its declared staleness, and the teacher's newest only.
    """
    student: dict[int, set[int]] = defaultdict(set)
    teacher: dict[int, set[int]] = defaultdict(set)
    problems = []
    for rank, row in enumerate(rows):
        updates = Counter[tuple[Role, int]]()
        named = set[Action]()  # once, not in every step
        for action in row:
            if not action.computes or action.op not in _READS_WEIGHTS:
                if action.op in (Op.UPDATE, Op.EMA):
                    updates[action.role, action.stage] += 1
                trained = updates[Role.STUDENT, action.stage]
                if action.op is Op.EMA and trained != action.step + 1 and action.at(0) not in named:
                    named.add(action.at(0))
                    problems.append(f"rank {rank}: {action} follows student version {trained}, not {action.step + 1}")
                continue
            newest = updates[action.role, action.stage]
            if action.role is Role.TEACHER:
                expected = max(0, action.step - structure.staleness) if structure.momentum else 0
                used, versions = newest, teacher
            elif structure.train:
                expected = max(0, action.step - structure.student_staleness)
                used, versions = sorted((newest - structure.student_staleness, expected, newest))[1], student
            else:
                continue
            versions[action.step].add(used)
            if used != expected and action.at(0) not in named:
                named.add(action.at(0))
                who = action.role.name.lower()
                problems.append(f"rank {rank}: {action} reads {who} version {used}, expected version {expected}")
    steps = sorted(student)
    return tuple(Versions(k, tuple(sorted(student[k])), tuple(sorted(teacher[k]))) for k in steps), problems


def _bounds(
    rows: Sequence[Sequence[Action]], structure: PipelineStep, stash: Sequence[int], run_ahead: int
) -> tuple[tuple[int, ...], int, list[str]]:
    """Stash peak of every rank and the largest run-ahead, and where they pass the declared bounds."""
    peaks, most_ahead, problems = [], 0, []
    for rank, row in enumerate(rows):
        held = peak = 0
        student, teacher = structure.stages_of(rank, Role.STUDENT), structure.stages_of(rank, Role.TEACHER)
        ahead = 0
        for action in row:
            if not action.computes:
                continue
            if action.op is Op.FORWARD and action.role is Role.STUDENT and structure.train:
                held += 1
            elif action.op is structure.backward_ops[-1]:
                held -= 1
            if action.op is Op.FORWARD and student and teacher:
                taught = len(student) * structure.views
                ahead += taught if action.role is Role.TEACHER else -len(teacher) * structure.teacher_views
                most_ahead = max(most_ahead, -(-ahead // (taught * len(teacher))))
            if held > peak:
                peak = held
                if held > stash[rank]:
                    problems.append(
                        f"rank {rank}: {action} makes {held} stashed microbatches, the bound is {stash[rank]}"
                    )
            if most_ahead > run_ahead and action.role is Role.TEACHER:
                problems.append(f"rank {rank}: {action} runs {most_ahead} microbatches ahead, the bound is {run_ahead}")
                break
        peaks.append(peak)
    return tuple(peaks), most_ahead, problems
