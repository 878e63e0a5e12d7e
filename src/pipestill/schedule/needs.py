"""What each action waits for."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

from pipestill.schedule.action import Action, Kind, Lane, Op, Role
from pipestill.schedule.blockwise.structure import BlockwiseStructure
from pipestill.schedule.schedule import PipelineStructure, Structure


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

    if action.op is Op.DATA:
        return [data.at(step - 1)]
    if isinstance(structure, BlockwiseStructure):
        return _block_needs(action, structure)
    if action.op is Op.FORWARD:
        assert m is not None
        before = [data]
        if stage:
            before.append(Action(action.role, stage - 1, Op.FORWARD, m, step))
        else:
            before += _pass_before(action, structure)
        if action.role is Role.TEACHER:
            if structure.momentum:
                before.append(Action(Role.TEACHER, stage, Op.EMA, None, step - 1 - structure.staleness))
        elif structure.train:
            before.append(Action(Role.STUDENT, stage, Op.UPDATE, None, step - 1 - structure.student_staleness))
        return before
    last = structure.last
    if action.op is Op.LOSS:
        assert m is not None
        outputs = [Action(Role.STUDENT, last, Op.FORWARD, u, step) for u in structure.units_of_loss(m, Role.STUDENT)]
        if structure.teacher_ranks:
            ends = len(structure.teacher_ranks) - 1
            taught = [Action(Role.TEACHER, ends, Op.FORWARD, u, step) for u in structure.units_of_loss(m, Role.TEACHER)]
            outputs = [*taught, *outputs]
        return [data, *outputs, *_gradients_before(action, structure)]
    if action.op is Op.WEIGHT:
        return [Action(Role.STUDENT, stage, Op.INPUT, m, step)]
    if action.op in structure.backward_ops:
        assert m is not None
        own = Action(Role.STUDENT, stage, Op.FORWARD, m, step)
        if stage < last:
            after = Action(Role.STUDENT, stage + 1, action.op, m, step)
            return [own, after, *_gradients_before(action, structure)]
        loss = Action(Role.STUDENT, last, Op.LOSS, structure.loss_of_unit(m), step)
        return [own, loss, *(end for end in _pass_before(action, structure) if end != own)]
    if action.op is Op.EMA:
        return [Action(Role.STUDENT, stage, Op.UPDATE, None, step), action.at(step - 1)]
    if action.op is Op.UPDATE and structure.clip:
        norms = [Action(Role.STUDENT, i, Op.NORM, None, step) for i in range(last + 1)]
        return [*norms, action.at(step - 1)] if structure.student_staleness else norms
    units = range(structure.num_units(Role.STUDENT))
    gradients = [Action(Role.STUDENT, stage, structure.backward_ops[-1], u, step) for u in units]
    return [*gradients, action.at(step - 1)] if structure.student_staleness else gradients


def _block_needs(action: Action, structure: BlockwiseStructure) -> list[Action]:
    """Of blocks that train alone."""
    step, share = action.step, structure.share_of(action)
    if action.op is Op.REDUCE:
        return [Action(a.role, a.stage, Op.BACKWARD, a.microbatch, step) for a in structure.sharers(action)]
    if action.op is Op.UPDATE:
        return [
            Action(
                action.role, action.stage, structure.student_ops(action.stage, share.batch)[-2], action.microbatch, step
            )
        ]
    before = [Action(Role.STUDENT, 0, Op.DATA, None, step)]
    for block in structure.reads(action):
        units = structure.sources(block, share) if block >= 0 else []
        before += [Action(Role.TEACHER, block, Op.FORWARD, u, step) for u in units]
    if action.op is Op.BACKWARD:
        before += [update for update in (structure.before(action),) if update is not None]
    else:
        before += [a.at(step - 1 - structure.ahead) for a in structure.receipts.get(action.at(0), [])]
    if structure.barrier and share.batch == 0:
        before += [a.at(step - 1) for a in structure.actions() if a.op is Op.UPDATE and a.at(step - 1) not in before]
    return before


def meets(action: Action) -> bool:
    """Whether what an action needs of other ranks reaches it by a collective, and not by sends and receives."""
    return action.op is Op.REDUCE


def _gradients_before(action: Action, structure: PipelineStructure) -> list[Action]:
    """The update that takes what the step before has added up on a stage. Elsewhere, forwards need it anyway."""
    stale = structure.student_staleness and structure.train
    return [Action(Role.STUDENT, action.stage, Op.UPDATE, None, action.step - 1)] if stale else []


def _pass_before(action: Action, structure: PipelineStructure) -> list[Action]:
    """For the first action of a pass in a serial structure: the last of the pass before it in the step, if any."""
    if not structure.serial:
        return []
    assert action.microbatch is not None
    before = _order(structure).get((action.role, action.op, action.microbatch))
    if before is None:
        return []
    role, op, unit = before
    if op is Op.FORWARD:
        ends = structure.student_ranks if role is Role.STUDENT else structure.teacher_ranks
        return [Action(role, len(ends) - 1, op, unit, action.step)]
    return [Action(role, 0, op, unit, action.step)]


@lru_cache(maxsize=16)
def _order(structure: PipelineStructure) -> dict[tuple[Role, Op, int], tuple[Role, Op, int]]:
    """For each pass of a step, the one before it; the loss belongs to the backward, which needs it anyway."""
    passes = [p for p in structure.passes() if p[1] is not Op.LOSS]
    return {after: before for before, after in pairwise(passes)}


def lane(transfer: Action, destination: int, structure: Structure) -> Lane:
    """The channel of the edge to rank `destination` on which `transfer` (a send or a receive) travels."""
    if transfer.op is Op.DATA:
        return Lane.DATA
    if isinstance(structure, BlockwiseStructure):
        key = transfer.payload.at(0), destination
        return Lane.TEACHER if key in structure.relays else Lane.STATE if key in structure.moves else Lane.TOKEN
    if transfer.op is Op.NORM:
        return Lane.NORM
    if transfer.op in (Op.BACKWARD, Op.INPUT):
        return Lane.GRADIENT if transfer.stage else Lane.TOKEN
    if transfer.role is Role.STUDENT:
        return Lane.ACTIVATION if transfer.stage < structure.last else Lane.TOKEN
    ends_teacher = transfer.stage == len(structure.teacher_ranks) - 1
    if ends_teacher and destination != structure.student_ranks[structure.last]:
        return Lane.TOKEN
    return Lane.TEACHER
