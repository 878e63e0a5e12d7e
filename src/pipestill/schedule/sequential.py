"""Plain inter-layer model parallelism: one device works at a time.

rank 0   T0 .. F0 .. .. B0 T1 .. F1 .. .. B1 U
rank 1   .. T0 .. F0 B0 .. .. T1 .. F1 B1 U        (time runs right; here all work takes equally long)
"""

from __future__ import annotations

from pipestill.schedule.action import Action
from pipestill.schedule.comms import connect
from pipestill.schedule.program import Schedule, Structure


def sequential(num_stages: int, num_microbatches: int, *, teacher: bool = True) -> Schedule:
    """Each microbatch runs through the whole teacher, the whole student and back before the next one starts."""
    ranks = tuple(range(num_stages))
    structure = Structure(ranks, ranks if teacher else (), num_microbatches, serial=True)
    rows: list[list[Action]] = [[] for _ in ranks]
    for action in list(structure.actions())[1:]:
        rows[structure.rank_of(action)].append(action)
    return connect("sequential", structure, rows, (1,) * num_stages, run_ahead=1 if teacher else 0)
