"""A table of what each piece of a pipeline's work takes and waits for, since searches for schedules ask again and again."""

from math import ceil
from typing import NamedTuple

from pipestill.costs import StageCosts
from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.pipeline.needs import needs
from pipestill.schedule.pipeline.structure import PipelineStructure

Rows = list[list[Action]]
"""The work of one period on each rank, in order: a schedule without transfers and reads of the data."""


class Timed(NamedTuple):
    """A start time, and the work that starts then."""

    start: float
    action: Action | None
    """None for a forward of a frozen teacher, where it is not settled yet which one."""


class Wait(NamedTuple):
    """A result that some work of step 0 needs."""

    result: Action
    """The work that gives it, written as one of step 0."""
    step: int
    """The step that it is of: 0, or less for what an earlier step leaves behind."""
    transfer_seconds: float
    """How long the result is on its way; 0 where it stays on its rank."""
    far: bool
    """Whether the result comes from another rank."""


class WorkTable:
    """Seconds and waits of all work of one step. `waits` leaves out the data, which is read in time."""

    def __init__(self, structure: PipelineStructure, costs: StageCosts) -> None:
        work = [action for action in structure.actions() if action.op is not Op.DATA]
        self.seconds = {action: structure.work_seconds(action, costs) * costs.interference for action in work}
        self.waits: dict[Action, list[Wait]] = {action: [] for action in work}
        for action, waits in self.waits.items():
            for need in needs(action, structure):
                if need.op is not Op.DATA:
                    far = structure.rank_of(need) != structure.rank_of(action)
                    transfer = structure.transfer_seconds(need, structure.rank_of(action), costs) if far else 0.0
                    waits.append(Wait(need.at(0), need.step, transfer, far))


def is_teacher_forward(action: Action) -> bool:
    """Whether an action is a forward of the teacher."""
    return action.role is Role.TEACHER and action.op is Op.FORWARD


def most_ahead(rows: Rows, structure: PipelineStructure) -> int:
    """The most units that the teacher is ahead of the student on any rank, over all periods."""
    units = structure.num_units(Role.TEACHER)
    most = 0
    for row in rows:
        student_forwards = 0
        for action in row:
            if is_teacher_forward(action):
                assert action.microbatch is not None
                teacher_forwards = action.step * units + action.microbatch + 1
                # In microbatches both models have as many forwards as views; a unit of the student is the measure.
                ahead = teacher_forwards * structure.views - student_forwards * structure.teacher_views
                most = max(most, ceil(ahead / structure.views))
            elif action.op is Op.FORWARD:
                student_forwards += 1
    return most
