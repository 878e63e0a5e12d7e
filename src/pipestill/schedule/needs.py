"""What each action waits for."""

from __future__ import annotations

from pipestill.schedule.action import Action, Kind, Lane, Op, Role
from pipestill.schedule.program import Structure


def needs(action: Action, structure: Structure) -> list[Action]:
    """The work whose results `action` uses directly, in the order in which a plain loop would do it.

    A receive waits for its step's data, since a batch's rows size the buffer; a send for the work it carries.
    Actions of steps before 0 are left to the caller.
    """
    step, m, stage = action.step, action.microbatch, action.stage
    data = Action(Role.STUDENT, 0, Op.DATA, None, step)
    if action.kind is Kind.SEND:
        return [action.payload]
    if action.kind is Kind.RECEIVE:
        return [] if action.op is Op.DATA else [data]

    def forward(role: Role, of_stage: int) -> Action:
        return Action(role, of_stage, Op.FORWARD, m, step)

    last = structure.last
    last_teacher = len(structure.teacher_ranks) - 1
    if action.op is Op.DATA:
        return [data.at(step - 1)]
    if action.op is Op.FORWARD:
        before = [data, forward(action.role, stage - 1)] if stage else [data]
        if action.role is Role.TEACHER:
            return before
        if structure.serial and stage == 0 and last_teacher >= 0:
            before.append(forward(Role.TEACHER, last_teacher))
        if structure.train:
            before.append(Action(Role.STUDENT, stage, Op.UPDATE, None, step - 1))
        return before
    if action.op is Op.LOSS:
        teacher = [forward(Role.TEACHER, last_teacher)] if last_teacher >= 0 else []
        return [data, *teacher, forward(Role.STUDENT, last)]
    if action.op is Op.BACKWARD:
        source = (
            Action(Role.STUDENT, last, Op.LOSS, m, step)
            if stage == last
            else Action(Role.STUDENT, stage + 1, Op.BACKWARD, m, step)
        )
        return [forward(Role.STUDENT, stage), source]
    return [Action(Role.STUDENT, stage, Op.BACKWARD, i, step) for i in range(structure.num_microbatches)]


def lane(transfer: Action, destination: int, structure: Structure) -> Lane:
    """The channel of the edge to rank `destination` on which `transfer` (a send or a receive) travels."""
    if transfer.op is Op.DATA:
        return Lane.DATA
    if transfer.op is Op.BACKWARD:
        return Lane.GRADIENT
    if transfer.role is Role.STUDENT:
        return Lane.ACTIVATION
    ends_teacher = transfer.stage == len(structure.teacher_ranks) - 1
    if ends_teacher and destination != structure.student_ranks[structure.last]:
        return Lane.TOKEN
    return Lane.TEACHER
