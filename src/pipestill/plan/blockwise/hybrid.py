"""The strategies `hybrid` and `relay`: stages of consecutive blocks on groups of consecutive ranks, by exact search.

    blocks     0  1 | 2  3  4 | 5
    ranks       0   |  1, 2   | 3         ranks 1 and 2 share the rows of blocks 2 to 4

They are those of Pipe-BD (Jang et al., DATE 2023), whose own search tries every candidate.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipestill.plan.blockwise.cost_model import Problem, Speeds, Stage, most_rows
from pipestill.schedule.blockwise.generate import AHEAD
from pipestill.schedule.blockwise.profile import BlockProfile

_Table = npt.NDArray[np.float64]
"""A value for each stage: of the blocks from `first` up to, without, `end`, at [first, end]."""
_ROUNDING = 1 + 1e-12  # sums that differ by less are equal


@dataclass(frozen=True, slots=True)
class Hybrid:
    """The best stages, in order, and what the cost model says about them."""

    stages: tuple[Stage, ...]
    stage_seconds: tuple[float, ...]
    """Predicted seconds of each stage for one batch."""
    memory_bytes: tuple[int, ...] = ()
    """The most bytes that each rank holds; empty when the profile does not say what blocks hold."""

    @property
    def seconds(self) -> float:
        """Seconds of one batch in the steady state: the slowest stage's."""
        return max(self.stage_seconds)


def hybrid(
    profile: BlockProfile, batch: int, devices: int, *, memory_bytes: float | None = None, speeds: Speeds = None
) -> Hybrid:
    """Find the stages whose slowest one takes the least seconds, among all ways to divide blocks and ranks in order.

    Every rank is used; a group is as slow as its slowest member. A stage that needs more than `memory_bytes` on a rank
    is no candidate. Of equally good answers the one with the fewest seconds summed over ranks, then the smallest groups and
    the fewest blocks first.

    Exact, by two dynamic programmes over (ranks, blocks) in O(blocks^2 * ranks^2): the least possible slowest stage, then
    the least sum among stages that are no slower. Raises `PlanError` when nothing fits, with what the least would be.
    """
    problem = Problem(profile, batch, devices, speeds, memory_bytes)
    return _search(problem, range(devices), devices)


def relay(profile: BlockProfile, batch: int, devices: int, *, memory_bytes: float | None = None, speeds: Speeds = None) -> Hybrid:
    """Find what `hybrid` does with one rank for every stage. With fewer blocks than ranks, the slowest of the ranks stay idle."""
    problem = Problem(profile, batch, devices, speeds, memory_bytes)
    fastest = sorted(range(devices), key=lambda rank: -problem.pace[rank])[: len(profile.blocks)]
    return _search(problem, sorted(fastest), 1)


def _answer(problem: Problem, stages: tuple[Stage, ...]) -> Hybrid:
    """The stages with what the cost model says about them."""
    held = {rank: problem.bytes_of(stage) for stage in stages for rank in stage.ranks}
    memory = tuple(held.get(rank, 0) for rank in range(problem.devices)) if problem.profile.memory_known else ()
    return Hybrid(stages, tuple(map(problem.seconds_of, stages)), memory)


def _search(problem: Problem, ranks: Sequence[int], largest_group: int) -> Hybrid:
    """Find the best stages that use all of `ranks`, in groups of at most `largest_group`."""
    num_blocks = len(problem.profile.blocks)
    tables = [_cost_tables(problem, k) for k in range(1, largest_group + 1)]
    groups = [(start, end) for end in range(len(ranks) + 1) for start in range(max(0, end - largest_group), end)]

    def cost(start: int, end: int) -> _Table:
        work, rest, _ = tables[end - start - 1]
        return work / min(problem.pace[rank] for rank in ranks[start:end]) + rest

    def least_worst(cost: Callable[[int, int], _Table]) -> float:
        worst = np.full((len(ranks) + 1, num_blocks + 1), math.inf)  # when the first ranks hold the first blocks
        worst[0, 0] = 0.0
        for start, end in groups:
            through = np.maximum(worst[start, :-1, None], cost(start, end)).min(axis=0)
            np.minimum(worst[end], through, out=worst[end])
        return float(worst[-1, -1])

    limit = least_worst(cost) * _ROUNDING
    if limit == math.inf:
        raise problem.nothing_fits(least_worst(lambda start, end: tables[end - start - 1][2]))
    total = np.full((len(ranks) + 1, num_blocks + 1), math.inf)  # when ranks from one on hold blocks from one on
    total[-1, -1] = 0.0

    def totals(start: int, end: int) -> _Table:
        table = cost(start, end)
        return np.asarray(np.where(table <= limit, table * (end - start), math.inf) + total[end])

    for start, end in sorted(groups, reverse=True):
        np.minimum(total[start, :-1], totals(start, end).min(axis=1), out=total[start, :-1])
    stages: list[Stage] = []
    rank = block = 0
    while rank < len(ranks):
        ways = ((end, totals(rank, end)[block]) for start, end in groups if start == rank)
        group_end, sums = next((end, sums) for end, sums in ways if sums.min() <= total[rank, block] * _ROUNDING)
        stages.append(Stage(block, int((sums <= total[rank, block] * _ROUNDING).argmax()), tuple(ranks[rank:group_end])))
        rank, block = group_end, stages[-1].end
    return _answer(problem, tuple(stages))


def _cost_tables(problem: Problem, k: int) -> tuple[_Table, _Table, _Table]:
    """Cost tables over [first, end) for stages on k ranks: the terms of `stage_seconds` and `stage_memory_bytes`.

    They are the seconds of work at speed 1, all other seconds (infinite where there is no such stage or it does not fit), and the
    bytes on a rank.
    """
    profile, rows, whole_rows = problem.profile, problem.batch / k, most_rows(problem.batch, k)
    blocks, num_blocks = profile.blocks, len(profile.blocks)

    def over_stages(values: Sequence[float], collect: np.ufunc) -> _Table:
        table = np.zeros((num_blocks, num_blocks + 1))
        table[:, 1:] = collect.accumulate(np.triu(np.broadcast_to(values, (num_blocks, num_blocks))), axis=1)
        return table

    work = over_stages([block.teacher(rows) + block.student(rows) for block in blocks], np.add)
    rest = over_stages([profile.allreduce_seconds(block, k) for block in range(num_blocks)], np.add)
    rest += [[profile.relay_seconds(first, problem.batch, k) if first else 0.0] for first in range(num_blocks)]
    held = over_stages([b.teacher_bytes + b.state_bytes + whole_rows * b.input_bytes_per_row for b in blocks], np.add)
    held += over_stages([whole_rows * block.activation_bytes_per_row for block in blocks], np.maximum)
    held += [[whole_rows * block.input_bytes_per_row if first else 0] for first, block in enumerate(blocks)]
    waits = [1 + AHEAD] * (num_blocks - 1) + [1]
    held[:, 1:] += [whole_rows * profile.output_bytes_per_row(block) * count for block, count in enumerate(waits)]
    no_stage = np.tri(num_blocks, num_blocks + 1, dtype=bool)
    held[no_stage] = math.inf
    rest[no_stage if problem.memory_bytes is None else held > problem.memory_bytes] = math.inf
    return work, rest, held
