"""Rows that may be a good schedule of `fill`: cheap to write, and then timed and compared.

packed     the frozen teacher's forwards in the idle gaps of the student's timeline
greedy     list scheduling, for gradients of weights that wait and for teachers that move
inside     each teacher forward right before the student forward some units earlier
plain      the teacher first, then the student as in 1F1B
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from pipestill.costs import StageCosts
from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.comms import connect
from pipestill.schedule.pipeline.greedy import Greedy
from pipestill.schedule.pipeline.one_f_one_b import student_order, teacher_order, warm_up
from pipestill.schedule.pipeline.pack import POLICIES, idle_windows, packed
from pipestill.schedule.pipeline.structure import PipelineStructure
from pipestill.schedule.pipeline.work import Rows, most_ahead
from pipestill.schedule.simulate import simulate
from pipestill.schedule.trace import Trace


@dataclass(frozen=True)
class Candidates:
    """Rows for one structure under given costs. Each is a period that ends with what ends a step.

    Args:
        structure: what a step computes
        costs: seconds of each kind of work on each stage
        first_stash: the most units between forward and backward on the first stage
        run_ahead: the most units that the teacher may be ahead of the student (None: as many as it takes)
    """

    structure: PipelineStructure
    costs: StageCosts
    first_stash: int
    run_ahead: int | None

    @cached_property
    def stash(self) -> tuple[int, ...]:
        """For each stage, the most units between forward and backward."""
        warm_ups = warm_up(self.structure, self.first_stash)
        return (self.first_stash,) * len(warm_ups) if self.structure.split else warm_ups

    @cached_property
    def orders(self) -> Rows:
        """For each stage, the order of the student's work, but for gradients of weights."""
        return _student_orders(self.structure, self.first_stash)

    @property
    def num_actions(self) -> int:
        """Pieces of work in a period."""
        s = self.structure
        flexible_per_stage = s.num_units(Role.TEACHER) if s.teacher_ranks else 0
        if s.split:
            flexible_per_stage += s.num_units(Role.STUDENT)
        return sum(map(len, self.orders)) + len(self.orders) * flexible_per_stage

    @cached_property
    def student_alone(self) -> Trace:
        """The simulated 1F1B of the student with whole backwards."""
        alone = dataclasses.replace(
            self.structure, teacher_ranks=(), momentum=False, staleness=0, student_staleness=0, split=False
        )
        orders, stash = _student_orders(alone, self.first_stash), warm_up(alone, self.first_stash)
        return simulate(connect("student", alone, orders, stash, run_ahead=0), self.costs)

    def all(self, few: bool) -> Iterator[Rows]:
        """All candidates; `few`: of those that take long to find, only the best kind."""
        s = self.structure
        if s.teacher_ranks and not s.momentum and not s.split:
            yield from self._packed()
        if s.split or s.momentum:
            yield from self._greedy(few)
        if s.teacher_ranks:
            yield from self._all_inside()
        if not s.staleness:
            yield self.plain()

    def plain(self) -> Rows:
        """The teacher's forwards first, then the student's 1F1B."""
        s = self.structure
        return self._with_weights([teacher_order(stage, s) + order for stage, order in enumerate(self.orders)])

    def _packed(self) -> list[Rows]:
        """The teacher's forwards in the student's gaps, by each policy, those that are the least ahead first."""
        windows = idle_windows(self.student_alone, self.costs, self.structure)
        different: list[Rows] = []
        for policy in POLICIES:
            rows = packed(windows, self.structure, self.costs, policy)
            if rows is not None and rows not in different:
                different.append(rows)
        return sorted(different, key=lambda rows: most_ahead(rows, self.structure))

    def _greedy(self, few: bool) -> Iterator[Rows]:
        """Rows by list scheduling, with several priorities; `few`: with one, since each may take seconds."""
        units = self.structure.num_units(Role.TEACHER)
        most = units + len(self.orders) if self.run_ahead is None else self.run_ahead
        ways = [
            (lead, ahead, weights_first)
            for lead, ahead in ((0, most), (1, most), (0, 2 * units))
            for weights_first in ((True, False) if self.structure.split else (True,))
            if self.run_ahead is None or ahead <= self.run_ahead
        ]
        for lead, ahead, weights_first in ways[:1] if few else ways:
            rows = Greedy(self.structure, self.costs, self.stash, ahead, lead, weights_first).rows()
            if rows is not None:
                yield rows

    def _all_inside(self) -> Iterator[Rows]:
        """The teacher ahead by nothing, by powers of two, by a whole step, and by as much as it may."""
        units = self.structure.num_units(Role.TEACHER)
        most = 2 * len(self.orders) + units - 1
        aheads = {0, units, *(2**i for i in range(most.bit_length()))}
        if self.run_ahead is not None:
            aheads.add(self.run_ahead - 1)
        for ahead in sorted(aheads):
            if ahead >= 0:
                yield self._with_weights(self._inside(ahead))

    def _inside(self, ahead: int) -> Rows:
        """Each teacher forward stands right before the student forward of the unit that is `ahead` units earlier.

        A momentum teacher's forwards for a later step stand after their weights' update.
        """
        structure = self.structure
        units, views = structure.num_units(Role.TEACHER), structure.teacher_views
        rows = []
        for stage, order in enumerate(self.orders):
            row, after_update = list[Action](), list[Action]()
            for action in order:
                if action.op is Op.FORWARD:
                    assert action.microbatch is not None
                    microbatch, view = divmod(action.microbatch, structure.views)
                    if view < views:  # the teacher sees this view too
                        step, unit = divmod(microbatch * views + view + ahead, units)
                        too_early = structure.momentum and step > structure.staleness
                        (after_update if too_early else row).append(Action(Role.TEACHER, stage, Op.FORWARD, unit, step))
                row.append(action)
            rows.append([*row, *after_update])
        return rows

    def _with_weights(self, rows: Rows) -> Rows:
        """Put each gradient of weights right after that of the input, where backwards are split."""
        if not self.structure.split:
            return rows
        complete = []
        for row in rows:
            complete.append(list[Action]())
            for action in row:
                complete[-1].append(action)
                if action.op is Op.INPUT:
                    complete[-1].append(dataclasses.replace(action, op=Op.WEIGHT))
        return complete


def _student_orders(structure: PipelineStructure, first_stash: int) -> Rows:
    """For each stage, the order of 1F1B with as many forwards first as the stash allows."""
    return [student_order(stage, structure, ahead) for stage, ahead in enumerate(warm_up(structure, first_stash))]
