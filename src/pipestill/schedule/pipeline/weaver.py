"""Weaves flexible work into fixed orders, so that a given period is kept where it can be.

Every rank repeats a fixed order of work; flexible work (teacher forwards, gradients of weights) may stand anywhere in it
that its needs allow, also in the period before:

    fixed order of a rank      F0   F1   B0   F2   B1   B2   U  | F0 ...       | the next period
    gaps between neighbours       ^    ^    ^    ^    ^    ^   ^
    with T0, T1 woven in       F0   F1   B0  (T0)  F2   B1  (T1)  B2   U

A start time for every work, counted in its own step, has to satisfy start(v) >= start(u) + seconds(u) - w * period wherever
v waits for u of w steps before: in needs, in memory bounds, and for neighbours on a rank. So the longest path from the second
of two neighbours back to the first tells what room there is between them. Each insertion takes the gap with the
most room and brings the paths up to date. (Insertion heuristics with exact slack, as in job-shop scheduling; the cyclic form is
that of modulo scheduling, Rau 1994.)

A frozen teacher's forwards are just so much work here: which of them stands where is settled afterwards (see `pack.labelled`).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipestill.costs import StageCosts
from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.pipeline.structure import PipelineStructure
from pipestill.schedule.pipeline.work import Rows, WorkTable, is_teacher_forward

_ROUNDING = 1e-9

Edges = list[tuple[int, float]]
"""Nodes at the other end of edges, and the edges' weights."""


class Bound(NamedTuple):
    """A rule besides the needs: `second` starts after `first`, of `steps` steps before, has ended."""

    first: Action
    second: Action
    steps: int


class _Placed(NamedTuple):
    """A piece of work at its place in a row."""

    node: int
    ahead: int
    """How many steps ahead of the period its step is."""


class _Gap(NamedTuple):
    """Where work may be inserted: behind place `position` of a row, for a step so many steps ahead of the period."""

    position: int
    ahead: int
    room: float
    """Seconds by which the work could be longer there."""


class _LongestPaths:
    """The longest paths between the nodes that are in the graph so far. `length[u, v]` is -inf where there is no path.

    An edge from u to v of weight w says that v starts at least w after u. So does a path, with the sum of its weights, and the
    longest path from u to v says what all edges together ask of the two. Where a path from u back to itself is longer than 0,
    no start times satisfy all edges.
    """

    def __init__(self, num_nodes: int) -> None:
        self.length: npt.NDArray[np.float64] = np.full((num_nodes, num_nodes), -np.inf)
        np.fill_diagonal(self.length, 0.0)
        self._inside = np.zeros(num_nodes, dtype=bool)

    def start(self, num_nodes: int, edges: Iterable[tuple[int, int, float]]) -> float:
        """Begin with the first `num_nodes` nodes and edges (from, to, weight) between them.

        Returns how long a path from a node back to itself gets: more than 0 where no start times satisfy the edges.
        """
        length = self.length[:num_nodes, :num_nodes]
        for start, end, weight in edges:
            length[start, end] = max(length[start, end], weight)
        for via in range(num_nodes):  # Floyd and Warshall
            np.maximum(length, length[:, via, None] + length[None, via, :], out=length)
        self._inside[:num_nodes] = True
        return float(np.diagonal(length).max())

    def add(self, node: int, before: Edges, after: Edges) -> None:
        """Add a node with edges from nodes `before` it and to nodes `after` it, which are in the graph."""
        length = self.length
        into = np.max([length[:, start] + weight for start, weight in before], axis=0)
        out = np.max([length[end, :] + weight for end, weight in after], axis=0)
        length[:, node] = np.maximum(length[:, node], into)
        length[node, :] = np.maximum(length[node, :], out)
        others = np.flatnonzero(self._inside)
        between = np.ix_(others, others)
        length[between] = np.maximum(length[between], into[others, None] + out[None, others])
        self._inside[node] = True

    def known(self, edges: Edges) -> Edges:
        """Select those edges whose other end is in the graph."""
        return [(node, weight) for node, weight in edges if self._inside[node]]


class Weaver:
    """The rows of one period, growing. `feasible` tells whether the fixed orders alone keep the period.

    Args:
        structure: what a step computes
        costs: seconds of each kind of work on each stage
        orders: each rank's fixed order of one step
        flexible: the work that may be inserted
        period: seconds in which the rows have to repeat
        bounds: what is to be kept besides the needs of the work
    """

    def __init__(
        self,
        structure: PipelineStructure,
        costs: StageCosts,
        orders: Sequence[Sequence[Action]],
        flexible: Iterable[Action],
        period: float,
        bounds: Iterable[Bound],
    ) -> None:
        self.structure = structure
        self.period = period
        fixed = [action for order in orders for action in order]
        self._actions = [*fixed, *flexible]  # by their node
        self._node = {action: node for node, action in enumerate(self._actions)}
        table = WorkTable(structure, costs)
        self._seconds = np.array([table.seconds[action] for action in self._actions])
        self._before: list[Edges] = [[] for _ in self._actions]  # edges from what each node waits for
        self._after: list[Edges] = [[] for _ in self._actions]  # edges to what waits for each node
        self._add_needs(table)
        for bound in bounds:
            self._add_edge(*bound)
        self._rows = [[_Placed(self._node[action], 0) for action in order] for order in orders]
        self._paths = _LongestPaths(len(self._actions))
        longest_cycle = self._paths.start(len(fixed), self._edges_between(len(fixed)))
        self.feasible = longest_cycle <= _ROUNDING * period

    def _add_needs(self, table: WorkTable) -> None:
        """Add an edge for each need, but for those of a frozen teacher's forwards and for their outputs."""
        for action in self._actions:
            for wait in table.waits[action]:
                if self.structure.momentum or Role.TEACHER not in (action.role, wait.result.role):
                    self._add_edge(wait.result, action, -wait.step, wait.transfer_seconds)

    def _add_edge(self, first: Action, second: Action, steps: int, transfer_seconds: float = 0.0) -> None:
        """Let `second` start after `first` of so many steps before has ended and its result has come, if both take part."""
        if first in self._node and second in self._node:
            start, end = self._node[first], self._node[second]
            weight = float(self._seconds[start]) + transfer_seconds - self.period * steps
            self._before[end].append((start, weight))
            self._after[start].append((end, weight))

    def _edges_between(self, num_nodes: int) -> list[tuple[int, int, float]]:
        """Edges between the first nodes: their needs and bounds, and what neighbours on a rank ask of each other."""
        edges = [(start, node, weight) for node in range(num_nodes) for start, weight in self._before[node]]
        edges = [edge for edge in edges if edge[0] < num_nodes]
        for row in self._rows:
            for one, other in zip(row, _following(row), strict=True):
                edges.append((one.node, other.node, self._seconds[one.node] - self.period * (other.ahead - one.ahead)))
        return edges

    def insert(self, action: Action, furthest: int, latest: bool) -> bool:
        """Place `action` where there is most room, or as late as there is any; False where none has room enough.

        Args:
            action: one of the flexible work
            furthest: the most steps that it may be ahead of the period
            latest: whether it takes the last gap with room in the least step that has one
        """
        node = self._node[action]
        gap = self._best_gap(action, furthest, latest)
        if gap.room < -_ROUNDING * self.period:
            return False
        row = self._rows[self.structure.rank_of(action)]
        one, other = row[gap.position], _following(row)[gap.position]
        from_one = float(self._seconds[one.node] - self.period * (gap.ahead - one.ahead))
        to_other = float(self._seconds[node] - self.period * (other.ahead - gap.ahead))
        before = [*self._paths.known(self._before[node]), (one.node, from_one)]
        after = [*self._paths.known(self._after[node]), (other.node, to_other)]
        self._paths.add(node, before, after)
        row.insert(gap.position + 1, _Placed(node, gap.ahead))
        return True

    def _best_gap(self, action: Action, furthest: int, latest: bool) -> _Gap:
        """The gap with the most room, the last of several; or with `latest` the last one with any, in the least step."""
        rounding = _ROUNDING * self.period
        best: _Gap | None = None
        for ahead in range(furthest + 1):
            cycles = self._cycles(action, ahead)
            room = float(-cycles.min())
            if best is None or room > best.room + rounding:
                fitting = np.flatnonzero(cycles <= (rounding if latest else rounding - room))
                best = _Gap(int(fitting[-1]) if len(fitting) else 0, ahead, room)
            if latest and room >= -rounding:
                break
        assert best is not None, "there is at least the period's own step"
        return best

    def _cycles(self, action: Action, ahead: int) -> npt.NDArray[np.float64]:
        """For each gap of its row that `action` may stand in, the longest path from it back to itself if it stood there.

        Such a path leaves to the neighbour behind it or to what waits for it, and comes back from the neighbour before it or
        from what it waits for. One that is longer than 0 is more than the period has room for.
        """
        node = self._node[action]
        row = self._rows[self.structure.rank_of(action)]
        following = _following(row)
        ones, others = (np.array([placed.node for placed in places]) for places in (row, following))
        into = self._seconds[ones] - self.period * (ahead - np.array([placed.ahead for placed in row]))
        out = self._seconds[node] - self.period * (np.array([placed.ahead for placed in following]) - ahead)
        before = self._paths.known(self._before[node])
        after = self._paths.known(self._after[node])
        length = self._paths.length
        longest: npt.NDArray[np.float64] = length[others, ones] + into + out
        for end, weight in after:
            longest = np.maximum(longest, length[end, ones] + into + weight)
        for start, weight in before:
            longest = np.maximum(longest, length[others, start] + weight + out)
            for end, other_weight in after:
                longest = np.maximum(longest, length[end, start] + weight + other_weight)
        return longest[: self._num_gaps(action, row)]

    def _num_gaps(self, action: Action, row: Sequence[_Placed]) -> int:
        """Count the gaps of a row that are open to `action`: gradients of weights never stand behind the update."""
        if action.op is Op.WEIGHT:
            for position, placed in enumerate(row):
                if self._actions[placed.node].op in (Op.GATHER, Op.NORM, Op.UPDATE):
                    return position
        return len(row)

    def result(self) -> Rows:
        """Every rank's row of one period, which ends with what ends a step there."""
        rows = [[self._actions[placed.node].at(placed.ahead) for placed in row] for row in self._rows]
        return [self._with_teacher_update(rank, row) for rank, row in enumerate(rows)] if self.structure.momentum else rows

    def timed(self) -> list[list[tuple[float, Action]]]:
        """Every rank's row with start times that keep the period."""
        start = self._paths.length[self._rows[0][0].node]
        return [[(float(start[placed.node]), self._actions[placed.node]) for placed in row] for row in self._rows]

    def _with_teacher_update(self, rank: int, row: list[Action]) -> list[Action]:
        """Let the teacher's weights move once all forwards are over that read what they were, and the update is done.

        The endless row is cut right there, and the update of the teacher ends the period.
        """
        last_unit = self.structure.num_units(Role.TEACHER) - 1
        last = max(i for i, action in enumerate(row) if is_teacher_forward(action) and action.microbatch == last_unit)
        updated = next(i for i, action in enumerate(row) if action.op is Op.UPDATE)
        periods_to_read = self.structure.staleness - row[last].step  # until the last forward of the old weights
        end = 1 + max(updated, last + periods_to_read * len(row))
        turned = []
        for place in range(end - len(row), end):
            period, position = divmod(place, len(row))
            turned.append(row[position].at(row[position].step + period))
        return [*turned, Action(Role.TEACHER, rank, Op.EMA, None, 0)]


def _following(row: Sequence[_Placed]) -> list[_Placed]:
    """For each place of a row, the one behind it: behind the last, the first one of the next period."""
    return [*row[1:], _Placed(row[0].node, row[0].ahead + 1)]
