"""What each action of a pipeline waits for, and on which lane its result travels."""

from functools import lru_cache
from itertools import pairwise

from pipestill.schedule.action import Action, Lane, Op, Role
from pipestill.schedule.pipeline.step import PipelineStep


def needs(work: Action, structure: PipelineStep) -> list[Action]:
    """The work whose results `work` uses directly, in the order in which a plain loop would do it."""
    return _NEEDS[work.op](work, structure)


def _forward(work: Action, structure: PipelineStep) -> list[Action]:
    """A forward needs the data, the stage before (or in a serial structure the pass before), and the weights' version."""
    before = [Action(Role.STUDENT, 0, Op.DATA, None, work.step)]
    if work.stage:
        before.append(Action(work.role, work.stage - 1, Op.FORWARD, work.microbatch, work.step))
    else:
        before += _pass_before(work, structure)
    if work.role is Role.TEACHER:
        if structure.momentum:
            before.append(Action(Role.TEACHER, work.stage, Op.EMA, None, work.step - 1 - structure.staleness))
    elif structure.train:
        before.append(Action(Role.STUDENT, work.stage, Op.UPDATE, None, work.step - 1 - structure.student_staleness))
    return before


def _loss(work: Action, structure: PipelineStep) -> list[Action]:
    """A loss needs the data's targets, and the forwards of all stages of which it takes something, the teacher's first."""
    assert work.microbatch is not None
    outputs = [
        Action(role, stage, Op.FORWARD, unit, work.step)
        for role, stages in ((Role.TEACHER, structure.taught_by(work.stage)), (Role.STUDENT, [work.stage]))
        for stage in stages
        for unit in structure.units_of_loss(work.microbatch, role)
    ]
    return [Action(Role.STUDENT, 0, Op.DATA, None, work.step), *outputs, *_update_of_older_gradients(work, structure)]


def _backward(work: Action, structure: PipelineStep) -> list[Action]:
    """A backward (or its first half) needs its own forward, the loss of its stage, and the gradient from the stage behind."""
    assert work.microbatch is not None
    before = [Action(Role.STUDENT, work.stage, Op.FORWARD, work.microbatch, work.step)]
    if work.stage in structure.loss_stages:
        before.append(Action(Role.STUDENT, work.stage, Op.LOSS, structure.loss_of_unit(work.microbatch), work.step))
    if work.stage < structure.last:
        behind = Action(Role.STUDENT, work.stage + 1, work.op, work.microbatch, work.step)
        return [*before, behind, *_update_of_older_gradients(work, structure)]
    return [*before, *(end for end in _pass_before(work, structure) if end not in before)]


def _weight_gradients(work: Action, structure: PipelineStep) -> list[Action]:
    """The second half of a backward needs the first."""
    return [Action(Role.STUDENT, work.stage, Op.INPUT, work.microbatch, work.step)]


def _gather(work: Action, structure: PipelineStep) -> list[Action]:
    """The gradients that other stages need need all backwards of the stage in the step; stale ones also the update before."""
    units = range(structure.num_units(Role.STUDENT))
    gradients = [Action(Role.STUDENT, work.stage, structure.backward_ops[-1], unit, work.step) for unit in units]
    return [*gradients, *_before_stale(work, structure)]


def _norm(work: Action, structure: PipelineStep) -> list[Action]:
    """The norm of a stage's gradients needs all of its backwards of the step, and the gradients of weights that it shares."""
    tied = structure.ties if work.stage in structure.ties else ()
    gathered = [Action(Role.STUDENT, stage, Op.GATHER, None, work.step) for stage in tied]
    return [*_gather(work, structure), *gathered]


def _update(work: Action, structure: PipelineStep) -> list[Action]:
    """An update needs all gradients of its stage, or with clipping the norms of all stages."""
    if not structure.clip:
        return _norm(work, structure)
    norms = [Action(Role.STUDENT, stage, Op.NORM, None, work.step) for stage in range(structure.last + 1)]
    return [*norms, *_before_stale(work, structure)]


def _teacher_update(work: Action, structure: PipelineStep) -> list[Action]:
    """A momentum teacher's weights move after the student's update, and after their own move before."""
    return [Action(Role.STUDENT, work.stage, Op.UPDATE, None, work.step), work.at(work.step - 1)]


_NEEDS = {
    Op.FORWARD: _forward,
    Op.LOSS: _loss,
    Op.BACKWARD: _backward,
    Op.INPUT: _backward,
    Op.WEIGHT: _weight_gradients,
    Op.GATHER: _gather,
    Op.NORM: _norm,
    Op.UPDATE: _update,
    Op.EMA: _teacher_update,
}


def _before_stale(work: Action, structure: PipelineStep) -> list[Action]:
    """The same work of the step before, which nothing else makes an update wait for when forwards read stale weights."""
    return [work.at(work.step - 1)] if structure.student_staleness else []


def _update_of_older_gradients(work: Action, structure: PipelineStep) -> list[Action]:
    """The update that takes the gradients which the step before has added up on a stage.

    Where forwards read the newest weights, they need it anyway.
    """
    stale = structure.student_staleness and structure.train
    return [Action(Role.STUDENT, work.stage, Op.UPDATE, None, work.step - 1)] if stale else []


def _pass_before(work: Action, structure: PipelineStep) -> list[Action]:
    """For the first action of a pass in a serial structure: the last action of the pass before it in the step, if any."""
    if not structure.serial:
        return []
    assert work.microbatch is not None
    before = _passes_before(structure).get((work.role, work.op, work.microbatch))
    if before is None:
        return []
    role, op, unit = before
    end = len(structure.ranks(role)) - 1 if op is Op.FORWARD else 0
    return [Action(role, end, op, unit, work.step)]


@lru_cache(maxsize=16)
def _passes_before(structure: PipelineStep) -> dict[tuple[Role, Op, int], tuple[Role, Op, int]]:
    """For each pass of a step, the one before it; the loss belongs to the backward, which needs it anyway."""
    passes = [p for p in structure.passes() if p[1] is not Op.LOSS]
    return {after: before for before, after in pairwise(passes)}


def lane(transfer: Action, destination: int, structure: PipelineStep) -> Lane:
    """The channel on which a result travels to rank `destination`; one that only tells that a pass has ended is a token."""
    if transfer.op in (Op.GATHER, Op.NORM):
        return Lane.TIE if transfer.op is Op.GATHER else Lane.NORM
    if transfer.op in (Op.BACKWARD, Op.INPUT):
        return Lane.GRADIENT if transfer.stage else Lane.TOKEN
    if transfer.role is Role.STUDENT:
        return Lane.ACTIVATION if transfer.stage < structure.last else Lane.TOKEN
    taken = structure.passes_output(transfer.stage, destination) or structure.features_to(transfer.stage, destination)
    return Lane.TEACHER if taken else Lane.TOKEN
