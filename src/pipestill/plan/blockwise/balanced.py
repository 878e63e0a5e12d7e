"""The strategy `balanced`: loads that are level beyond equal groups, by blocks that move between ranks and unequal rows.

Student blocks are independent and the teacher has no state, so the work of a window of K batches may be divided almost
anywhere. It is laid out in a line and divided into N pieces of equal length (McNaughton's wrap-around rule):

    work of a window     T0 S0 | T1 S1 | T2 S2
    three ranks          ------0----|----1-----|----2---

So it takes no longer than max(largest block, total / N). A student block that lies in two pieces is trained on one rank for the
first batches of the window and on its neighbour for the others, every batch whole and in order, hence exactly. A block
that alone is longer than a piece is shared by rows instead.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from pipestill.arguments import mebibytes
from pipestill.errors import PlanError
from pipestill.plan.blockwise.hybrid import hybrid
from pipestill.plan.blockwise.memory import memory_bytes_of
from pipestill.schedule import Role, Schedule
from pipestill.schedule.blockwise.generate import Portion, sliced, staged
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.schedule.blockwise.structure import BlockwiseCosts, BlockwiseStructure
from pipestill.schedule.simulate import simulate

_WINDOWS = (2, 3, 4, 6, 8, 12, 16)
_WORTH = 0.005  # of a batch's time, that a longer window has to save: it buffers more, and an epoch may end inside it
_HALVINGS = 40


@dataclass(frozen=True)
class _Layout:
    """A layout: which rank runs which portions of the blocks."""

    seconds: float
    """Seconds of the most loaded rank for a batch."""
    teacher: tuple[tuple[Portion, ...], ...]
    """The portions of each teacher block."""
    student: tuple[tuple[Portion, ...], ...]
    """The portions of each student block."""


def balanced(
    costs: BlockwiseCosts, num_ranks: int, memory_bytes: float | None = None
) -> tuple[Schedule[BlockwiseStructure], tuple[int, ...]]:
    """Find the fastest schedule, by simulation, among level layouts over windows of several lengths and the layout of `hybrid`.

    Returns the schedule and the ranks that it uses, which it counts from 0. A layout that holds more than `memory_bytes` on a
    rank is left out, with what a window buffers. Raises `PlanError` when nothing fits.
    """
    best: Schedule[BlockwiseStructure] | None = None
    used, fastest, least, refused = tuple(range(num_ranks)), math.inf, math.inf, ""
    try:
        best = _of_hybrid(costs, num_ranks, memory_bytes)
        fastest = simulate(best, costs).seconds_per_step
    except PlanError as error:
        if memory_bytes is None:
            raise
        refused = str(error)
    for window in _WINDOWS:
        layout = _level(costs, num_ranks, window)
        for schedule, ranks in _schedules(layout, window) if layout.seconds < fastest else ():
            if memory_bytes is not None:
                held = max(memory_bytes_of(schedule, costs))
                least = min(least, held)
                if held > memory_bytes:
                    continue
            seconds = simulate(schedule, costs.on(ranks)).seconds_per_step / window
            if seconds < fastest * (1 - _WORTH):
                best, used, fastest = schedule, ranks, seconds
    if best is None:
        raise PlanError(f"{refused}; of layouts with level loads, {mebibytes(least)}")
    return best, used


def _of_hybrid(costs: BlockwiseCosts, num_ranks: int, memory_bytes: float | None) -> Schedule[BlockwiseStructure]:
    """The schedule of `hybrid`'s layout."""
    speeds = costs.speeds or None
    found = hybrid(costs.profile, costs.batch, num_ranks, memory_bytes=memory_bytes, speeds=speeds)
    return staged("balanced", [(range(stage.first, stage.end), stage.ranks) for stage in found.stages])


def _schedules(layout: _Layout, window: int) -> Iterator[tuple[Schedule[BlockwiseStructure], tuple[int, ...]]]:
    """Yield the layout's schedule with the teacher's forwards in two orders, and the ranks that have something to do."""
    ranks = tuple(sorted({p.rank for portions in (*layout.teacher, *layout.student) for p in portions}))
    teacher, student = (
        [[replace(p, rank=ranks.index(p.rank)) for p in portions] for portions in of] for of in (layout.teacher, layout.student)
    )
    for teacher_first in (True, False):
        yield sliced(window, teacher, student, len(ranks), teacher_first=teacher_first), ranks


def _level(costs: BlockwiseCosts, num_ranks: int, window: int) -> _Layout:
    """Find the layout whose most loaded rank has the least to do, by bisection of the seconds that a rank may have."""
    profile, batch = costs.profile, costs.batch
    total = sum(block.teacher(batch) + block.student(batch) for block in profile.blocks)
    speeds = costs.speeds or (1.0,) * num_ranks
    low, high = total / sum(speeds), total / speeds[0] * (1 + 1e-9)
    best = _fill(profile, batch, num_ranks, window, high, costs.speeds)
    assert best is not None, "everything fits on one rank"
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        layout = _fill(profile, batch, num_ranks, window, middle, costs.speeds)
        if layout is None:
            low = middle
        else:
            best, high = layout, middle
    return best


class _Line:
    """Ranks that are filled one after the other, each up to `limit` seconds a batch at its own speed."""

    def __init__(self, num_ranks: int, limit: float, speeds: Sequence[float]) -> None:
        self.speeds = speeds or (1.0,) * num_ranks
        self.left = [limit * speed for speed in self.speeds]  # of work, as the profile's device would do it
        self.rank = 0

    @property
    def full(self) -> bool:
        """Whether no rank has room."""
        return self.rank >= len(self.left)

    @property
    def room(self) -> float:
        """Seconds of work, as the profile's device would take, that the rank being filled has room for."""
        return max(0.0, self.left[self.rank]) * (1 + 1e-12)

    def take(self, seconds: float) -> int:
        """Give so much work to the rank being filled, and say which one that is."""
        self.left[self.rank] -= seconds
        return self.rank


def _fill(
    profile: BlockProfile, batch: int, num_ranks: int, window: int, limit: float, speeds: Sequence[float]
) -> _Layout | None:
    """Lay teacher and student blocks out in a line, over ranks of `limit` seconds each; None when the ranks are too few."""
    line = _Line(num_ranks, limit, speeds)
    found: dict[Role, list[tuple[Portion, ...]]] = {Role.TEACHER: [], Role.STUDENT: []}
    for index, block in enumerate(profile.blocks):
        for role, seconds in ((Role.TEACHER, block.teacher(batch)), (Role.STUDENT, block.student(batch))):
            if role is Role.STUDENT and not line.full and seconds > max(line.left[line.rank :], default=0.0):
                portions = _by_rows(profile, index, batch, line, window)
            else:
                portions = _by_batches(seconds, line, window)
            if portions is None:
                return None
            found[role].append(portions)
    used = max(p.rank for portions in (*found[Role.TEACHER], *found[Role.STUDENT]) for p in portions)
    return _Layout(limit, tuple(found[Role.TEACHER]), tuple(found[Role.STUDENT])) if used < num_ranks else None


def _by_batches(seconds: float, line: _Line, window: int) -> tuple[Portion, ...] | None:
    """Give each rank in line as many batches of a block as fit; the first rank has the last ones."""
    portions, todo = [], window
    while todo:
        if line.full:
            return None
        fits = min(todo, int(line.room * window / seconds)) if seconds > 0 else todo
        if fits:
            rank = line.take(fits * seconds / window)
            portions.append(Portion(rank, range(todo - fits, todo)))
            todo -= fits
        if todo:
            line.rank += 1
    return tuple(portions)


def _by_rows(profile: BlockProfile, index: int, batch: int, line: _Line, window: int) -> tuple[Portion, ...] | None:
    """Give each rank in line as many rows of every batch as fit, of a block that is longer than any rank has room for."""
    for sharers in range(2, len(line.left) - line.rank + 1):
        rank, left = line.rank, list(line.left)
        extra = profile.allreduce_seconds(index, sharers)
        portions, done = [], 0
        for _ in range(sharers):
            waits = extra * line.speeds[line.rank]  # it takes as long on a fast rank, which could do more in it
            rows = _most_rows(profile, index, batch - done, line.room - waits)
            if rows:
                part = Fraction(done, batch), Fraction(done + rows, batch)
                line.take(profile.blocks[index].student(rows) + waits)
                portions.append(Portion(line.rank, range(window), part))
                done += rows
            if done < batch:
                line.rank += 1
            if done == batch or line.full:
                break
        if done == batch:
            return tuple(portions)
        line.rank, line.left = rank, left
    return None


def _most_rows(profile: BlockProfile, index: int, rows: int, seconds: float) -> int:
    """The most rows, up to `rows`, whose step of a student block takes no longer than `seconds`."""
    low, high = 0, rows
    while low < high:
        middle = (low + high + 1) // 2
        if profile.blocks[index].student(middle) <= seconds:
            low = middle
        else:
            high = middle - 1
    return low
