"""Times rows of work quickly: the simulator without contention on links, for searches that ask thousands of times."""

from __future__ import annotations

from collections.abc import Sequence

from pipestill.costs import StageCosts
from pipestill.schedule.action import Action, Op
from pipestill.schedule.needs import needs
from pipestill.schedule.pipeline.costs import action_seconds, transfer_seconds
from pipestill.schedule.pipeline.structure import PipelineStructure

_PERIODS = 9


class Clock:
    """Of one structure under given costs."""

    def __init__(self, structure: PipelineStructure, costs: StageCosts) -> None:
        self.structure, self.costs = structure, costs
        self.seconds = {a: action_seconds(a, structure, costs) * costs.interference for a in structure.actions()}
        self.needed: dict[Action, list[tuple[Action, int, float]]] = {}
        for action in self.seconds:
            rank = structure.rank_of(action)
            self.needed[action] = [
                (need.at(0), need.step, transfer_seconds(need, structure, costs))
                for need in needs(action, structure)
                if structure.rank_of(need) != rank and need.op is not Op.DATA
            ]

    def period(self, rows: Sequence[Sequence[Action]]) -> float | None:
        """Mean seconds of a late period; None where a rank gets stuck."""
        written = {a.at(0): a.step for row in rows for a in row}
        todo = [
            [
                (a.at(0), self.seconds[a.at(0)], [(n, a.step + d - written[n], c) for n, d, c in self.needed[a.at(0)]])
                for a in row
            ]
            for row in rows
        ]
        ends: dict[Action, list[float]] = {a: [] for a in written}
        where, now = [0] * len(rows), [0.0] * len(rows)
        marks: list[list[float]] = [[] for _ in rows]
        moved = True
        while moved:
            moved = False
            for rank, row in enumerate(todo):
                position, time = where[rank], now[rank]
                while position < len(row) * _PERIODS:
                    period, index = divmod(position, len(row))
                    action, seconds, needed = row[index]
                    for need, lag, comm in needed:
                        at = period + lag
                        if at < 0:
                            continue
                        done = ends[need]
                        if at >= len(done):
                            if at < _PERIODS:
                                break
                            continue
                        if done[at] + comm > time:
                            time = done[at] + comm
                    else:
                        time += seconds
                        ends[action].append(time)
                        position += 1
                        if index == len(row) - 1:
                            marks[rank].append(time)
                        continue
                    break
                if position != where[rank]:
                    where[rank], now[rank], moved = position, time, True
        if any(len(mark) < _PERIODS for mark in marks):
            return None
        half = _PERIODS // 2
        return max((mark[-2] - mark[half - 1]) / (_PERIODS - 1 - half) for mark in marks)
