"""A blockwise plan in words: which rank trains which blocks."""

from fractions import Fraction

from pipestill.plan.blockwise.plan import BlockwisePlan, Phase
from pipestill.schedule import Role


def describe(plan: BlockwisePlan) -> list[str]:
    """Describe each rank's work in a line.

    A rank with `teacher 0-1, 2-3:1/4; student 0, 1:2/3` runs a quarter of the rows of teacher blocks 2 and 3 each, and two thirds
    of student block 1's, counted over a window of batches. Phases are separated by `then`.
    """
    lines = []
    for rank in range(plan.num_devices):
        mine = [_of_rank(phase, phase.ranks.index(rank)) for phase in plan.phases if rank in phase.ranks]
        lines.append(" then ".join(mine) or "nothing")
    return lines


def phase_titles(plan: BlockwisePlan) -> list[str]:
    """The title of each phase's picture: what it trains, or just the plan's strategy where there is one phase."""
    on = f"{plan.strategy} on {plan.num_devices} {'device' if plan.num_devices == 1 else 'devices'}"
    if len(plan.phases) == 1:
        return [on]
    titles = []
    for phase in plan.phases:
        block = phase.blocks[0]
        name, number = plan.costs.profile.blocks[block].name, f"block {block}"
        ranks = "rank " + ", ".join(map(str, phase.ranks)) if plan.strategy == "ls" else on
        titles.append(f"{ranks}: {number}{'' if name == number else f', {name}'}")
    return titles


def _of_rank(phase: Phase, rank: int) -> str:
    """The blocks of both models that a rank runs in a phase."""
    structure = phase.schedule.structure
    parts = []
    for role, name in ((Role.TEACHER, "teacher"), (Role.STUDENT, "student")):
        held = []
        for block, shares in enumerate(structure.shares(role)):
            rows = sum((s.part[1] - s.part[0] for s in shares if s.rank == rank), Fraction(0)) / structure.window
            if rows:
                held.append((block, rows))
        if held:
            parts.append(f"{name} {_listed(held)}")
    return "; ".join(parts) or "nothing"


def _listed(held: list[tuple[int, Fraction]]) -> str:
    """Write blocks in a row as `2-4`, with the fraction of their rows where that is not 1, as in `5:1/3`."""
    runs: list[list[tuple[int, Fraction]]] = []
    for block, rows in held:
        if runs and (block - 1, rows) == runs[-1][-1]:
            runs[-1].append((block, rows))
        else:
            runs.append([(block, rows)])
    words = []
    for run in runs:
        (first, rows), (last, _) = run[0], run[-1]
        words.append(f"{first}-{last}" if last > first else f"{first}")
        words[-1] += "" if rows == 1 else f":{_fraction(rows)}"
    return ", ".join(words)


def _fraction(rows: Fraction) -> str:
    """Write a fraction as such, or as a decimal where it is unwieldy."""
    return str(rows) if rows.denominator <= 32 else f"{float(rows):.3g}"
