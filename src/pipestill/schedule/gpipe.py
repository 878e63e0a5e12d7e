"""GPipe: all forwards, then all backwards; the teacher's forwards first.

rank 0   T0 T1 F0 F1 .. .. B0 B1 U
rank 1   .. T0 T1 F0 F1 B0 B1 U        (time runs right; here all work takes equally long)
"""

from __future__ import annotations

from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.comms import connect
from pipestill.schedule.program import Schedule, Structure


def gpipe(num_stages: int, num_microbatches: int, *, teacher: bool = True) -> Schedule:
    """Every rank runs all teacher forwards, all student forwards, all backwards, then updates (GPipe, Huang et al.)."""
    ranks = tuple(range(num_stages))
    structure = Structure(ranks, ranks if teacher else (), num_microbatches)
    all_of_them = range(num_microbatches)
    rows = []
    for stage in ranks:
        row = [Action(Role.TEACHER, stage, Op.FORWARD, m, 0) for m in all_of_them if teacher]
        row += [Action(Role.STUDENT, stage, Op.FORWARD, m, 0) for m in all_of_them]
        for m in all_of_them:
            if stage == structure.last:
                row.append(Action(Role.STUDENT, stage, Op.LOSS, m, 0))
            row.append(Action(Role.STUDENT, stage, Op.BACKWARD, m, 0))
        rows.append([*row, Action(Role.STUDENT, stage, Op.UPDATE, None, 0)])
    stash = (num_microbatches,) * num_stages
    return connect("gpipe", structure, rows, stash, run_ahead=num_microbatches if teacher else 0)


def forward_only(num_stages: int, num_microbatches: int) -> Schedule:
    """The student's forwards and the loss action of each microbatch, without gradients: what validation runs."""
    ranks = tuple(range(num_stages))
    structure = Structure(ranks, (), num_microbatches, train=False)
    rows: list[list[Action]] = [[] for _ in ranks]
    for action in list(structure.actions())[1:]:
        rows[structure.rank_of(action)].append(action)
    return connect("forward-only", structure, rows, (0,) * num_stages, run_ahead=0)
