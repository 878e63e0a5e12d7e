"""A fast, contention-free timer for candidate schedules of one structure.

It is the simulator without transfers that queue on a link and without what messages cost, for searches that time thousands
of rows. Rows repeat, so a few periods are played, and the later ones are measured:

    periods played     0   1   2   3   4   5   6   7   8
    measured                       |---------------|      from the end of period 3 to that of period 7

Rows settle in the first periods. In the last one a rank may run on by itself, because nothing after it is played.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pipestill.costs import StageCosts
from pipestill.schedule.action import Action
from pipestill.schedule.pipeline.structure import PipelineStructure
from pipestill.schedule.pipeline.work import WorkTable

_PERIODS = 9  # that are played
_SETTLED = 3  # the period at whose end the measurement begins
_LAST = 7  # the period at whose end it ends


class Clock:
    """A fast, contention-free timer for candidate schedules of one structure under given costs."""

    def __init__(self, structure: PipelineStructure, costs: StageCosts) -> None:
        self.structure = structure
        self._table = WorkTable(structure, costs)
        self._number = {action: number for number, action in enumerate(self._table.seconds)}

    def period(self, rows: Sequence[Sequence[Action]]) -> float | None:
        """Mean seconds of a settled period of `rows`; None where a rank gets stuck."""
        written = {action.at(0): action.step for row in rows for action in row}
        run = _Run([[self._item(action, written) for action in row] for row in rows], len(self._number))
        moved = True
        while moved:
            moved = sum(run.advance(rank) for rank in range(len(rows))) > 0
        ends = [run.ends[self._number[row[-1].at(0)]] for row in rows]
        if any(len(of_rank) < _PERIODS for of_rank in ends):
            return None
        return max((of_rank[_LAST] - of_rank[_SETTLED]) / (_LAST - _SETTLED) for of_rank in ends)

    def _item(self, action: Action, written: dict[Action, int]) -> _Item:
        """Look up what an action of a row takes and waits for. `written`: the step that each action has in the rows."""
        work = action.at(0)
        waits = [
            (self._number[wait.result], action.step + wait.step - written[wait.result], wait.transfer_seconds)
            for wait in self._table.waits[work]
            if wait.far  # what is on the same rank has ended before
        ]
        return _Item(self._number[work], self._table.seconds[work], waits)


class _Item(NamedTuple):
    """One piece of work of a period."""

    number: int
    seconds: float
    waits: list[tuple[int, int, float]]
    """Numbers of work on other ranks, how many periods later (0 or less: earlier) that stands, and transfer seconds."""


class _Run:
    """The state of one timing: how far each rank has come, and when each piece of work has ended."""

    def __init__(self, rows: Iterable[Sequence[_Item]], num_works: int) -> None:
        self.todo = [[(period, item) for period in range(_PERIODS) for item in row] for row in rows]
        self.position = [0] * len(self.todo)  # of each rank, in its todo
        self.now = [0.0] * len(self.todo)  # when each rank's last work ended
        self.ends: list[list[float]] = [[] for _ in range(num_works)]  # of each work, in each period so far

    def advance(self, rank: int) -> bool:
        """Run a rank's work until some of it has to wait for another rank; whether there was any to run."""
        todo, now = self.todo[rank], self.now[rank]
        first = position = self.position[rank]
        while position < len(todo):
            period, (number, seconds, waits) = todo[position]
            start = self._start(period, waits, now) if waits else now
            if start is None:
                break
            now = start + seconds
            self.ends[number].append(now)
            position += 1
        self.position[rank], self.now[rank] = position, now
        return position > first

    def _start(self, period: int, waits: list[tuple[int, int, float]], now: float) -> float | None:
        """Find when work can start that waits for other ranks; None while some of that has not ended."""
        for number, later, transfer in waits:
            awaited = period + later
            if not 0 <= awaited < _PERIODS:
                continue  # of a period that is not played
            ends = self.ends[number]
            if awaited >= len(ends):
                return None
            now = max(now, ends[awaited] + transfer)
        return now
