"""1F1B: after a short warm-up, every rank alternates one forward and one backward; the teacher's forwards first.

rank 0   T0 T1 T2 F0 F1 .. B0 F2 B1 .. B2 U
rank 1   .. T0 T1 T2 F0 B0 F1 B1 F2 B2 U     (time runs right; here all work takes equally long)
"""

from __future__ import annotations

from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.comms import connect
from pipestill.schedule.program import Schedule, Structure


def student_order(stage: int, num_stages: int, num_microbatches: int) -> list[Action]:
    """One rank's student work in 1F1B order: `num_stages - stage` forwards, then backward and forward in turn."""
    ahead = min(num_stages - stage, num_microbatches)
    order = [Action(Role.STUDENT, stage, Op.FORWARD, m, 0) for m in range(ahead)]
    for m in range(num_microbatches):
        if stage == num_stages - 1:
            order.append(Action(Role.STUDENT, stage, Op.LOSS, m, 0))
        order.append(Action(Role.STUDENT, stage, Op.BACKWARD, m, 0))
        if m + ahead < num_microbatches:
            order.append(Action(Role.STUDENT, stage, Op.FORWARD, m + ahead, 0))
    return [*order, Action(Role.STUDENT, stage, Op.UPDATE, None, 0)]


def stash_bounds(num_stages: int, num_microbatches: int) -> tuple[int, ...]:
    """1F1B holds at most as many microbatches as there are stages from this one to the last."""
    return tuple(min(num_stages - stage, num_microbatches) for stage in range(num_stages))


def one_f_one_b(num_stages: int, num_microbatches: int, *, teacher: bool = True) -> Schedule:
    """Every rank runs all teacher forwards, then the student's 1F1B (PipeDream-Flush, Narayanan et al.)."""
    ranks = tuple(range(num_stages))
    structure = Structure(ranks, ranks if teacher else (), num_microbatches)
    rows = [
        [Action(Role.TEACHER, stage, Op.FORWARD, m, 0) for m in range(num_microbatches) if teacher]
        + student_order(stage, num_stages, num_microbatches)
        for stage in ranks
    ]
    stash = stash_bounds(num_stages, num_microbatches)
    return connect("1f1b", structure, rows, stash, run_ahead=num_microbatches if teacher else 0)
