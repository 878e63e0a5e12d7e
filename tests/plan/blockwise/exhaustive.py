"""The search that Pipe-BD describes: every candidate is tried. `hybrid` has to find the same."""

from collections.abc import Iterator
from itertools import combinations, pairwise

from pipestill.plan.blockwise.cost_model import Problem, Speeds, Stage
from pipestill.plan.blockwise.hybrid import Hybrid, _answer as hybrid_of
from pipestill.schedule.blockwise.profile import BlockProfile

ROUNDING = 1 + 1e-12  # sums that differ by less are equal


def exhaustive(
    profile: BlockProfile, batch: int, devices: int, *, memory_bytes: float | None = None, speeds: Speeds = None
) -> Hybrid:
    """Find what `hybrid` does by trying each of the C(devices + blocks - 2, devices - 1) candidates, for small searches."""
    problem = Problem(profile, batch, devices, speeds, memory_bytes)
    every = list(candidates(len(profile.blocks), devices))
    fitting = [stages for stages in every if problem.fits(stages)]
    if not fitting:
        raise problem.nothing_fits(min(max(map(problem.bytes_of, stages)) for stages in every))
    costs = [(tuple(map(problem.seconds_of, stages)), stages) for stages in fitting]
    worst = min(max(seconds) for seconds, _ in costs) * ROUNDING
    costs = [(seconds, stages) for seconds, stages in costs if max(seconds) <= worst]
    sums = [sum(s * len(stage.ranks) for s, stage in zip(seconds, stages, strict=True)) for seconds, stages in costs]
    best = [stages for total, (_, stages) in zip(sums, costs, strict=True) if total <= min(sums) * ROUNDING]
    return hybrid_of(problem, min(best, key=lambda stages: [(len(s.ranks), s.end) for s in stages]))


def candidates(num_blocks: int, num_ranks: int) -> Iterator[tuple[Stage, ...]]:
    """Yield every way to divide blocks and ranks into stages."""
    for num_stages in range(1, min(num_blocks, num_ranks) + 1):
        for cuts in combinations(range(1, num_blocks), num_stages - 1):
            for bounds in combinations(range(1, num_ranks), num_stages - 1):
                blocks, ranks = pairwise((0, *cuts, num_blocks)), pairwise((0, *bounds, num_ranks))
                yield tuple(Stage(*held, tuple(range(*group))) for held, group in zip(blocks, ranks, strict=True))
