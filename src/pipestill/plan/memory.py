"""The memory of a pipeline: what a schedule makes each rank hold at its worst moment."""

from collections import deque
from collections.abc import Iterator, Sequence
from math import ceil

from pipestill.arguments import mebibytes
from pipestill.costs import Costs, StageCosts, stage_blocks
from pipestill.errors import PlanError
from pipestill.schedule.action import Action, Kind, Lane, Op, Role
from pipestill.schedule.pipeline.structure import PipelineStructure
from pipestill.schedule.schedule import Schedule
from pipestill.schedule.structure import lane

_SENDS_KEPT = 32  # messages of a rank, as in runtime/transport/process_group.py: a send is not known to have arrived before
_VALUES = frozenset((Lane.TEACHER, Lane.ACTIVATION, Lane.GRADIENT))  # other transfers are a few numbers, or labels


def refuse_more_than(limit_bytes: float, held_bytes: Sequence[int]) -> None:
    """Raise `PlanError` where a rank would hold more than `limit_bytes`, or where `held_bytes`, of each rank, are not known."""
    if not held_bytes:
        raise PlanError(
            "these costs do not tell what blocks hold in memory, so no limit of it can be kept; measure them anew "
            "('pipestill profile'), or leave out --memory"
        )
    most = max(held_bytes)
    if most > limit_bytes:
        raise PlanError(
            f"rank {held_bytes.index(most)} would hold {mebibytes(most)}, more than the {mebibytes(limit_bytes)} of --memory"
        )


def memory_bytes_of(
    schedule: Schedule[PipelineStructure], costs: Costs, student_partition: Sequence[int], teacher_partition: Sequence[int]
) -> tuple[int, ...]:
    """The most bytes that each rank holds; () for costs that do not tell what blocks stash.

    They are the weights of both models' stages, the student's gradients and optimizer state, and at the worst moment of the
    rank's row: what each unit keeps from its forward to its backward, values that have arrived and are not yet used, the
    teacher's outputs that wait for their loss, and the last values that the rank sent. What a kernel needs while it runs, and
    the framework itself, are not counted.
    """
    if not costs.know_memory:
        return ()
    student = stage_blocks(costs.student, student_partition, "student")
    weights = [sum(b.parameter_bytes + b.training_bytes for b in blocks) for blocks in student]
    for rank, blocks in enumerate(stage_blocks(costs.teacher, teacher_partition, "teacher")):
        weights[rank] += sum(b.parameter_bytes for b in blocks)
    stash = [sum(b.stash_bytes for b in blocks) for blocks in student]
    stages = costs.stages(student_partition, teacher_partition)
    sends = [sum(action.kind is Kind.SEND for action in row) for row in schedule.rows]
    rows = schedule.unroll(2 + schedule.lookahead + ceil(_SENDS_KEPT / max(1, *sends)))
    return tuple(w + _peak(rank, rows[rank], schedule.structure, stages, stash) for rank, w in enumerate(weights))


def _peak(rank: int, row: Sequence[Action], structure: PipelineStructure, costs: StageCosts, stash: Sequence[int]) -> int:
    """The most bytes that values take on a rank, over enough steps for every order that its row can produce."""
    held = dict[Action, int]()
    sent = deque[tuple[Action, int]](maxlen=_SENDS_KEPT)
    most = 0
    for action in row:
        value = action.payload
        destination = rank if action.kind is Kind.RECEIVE or action.peer is None else action.peer
        is_message = not action.computes and lane(value, destination, structure) in _VALUES
        if action.kind is Kind.RECEIVE and is_message:
            held[value] = int(structure.result_bytes(value, costs))
        elif is_message:
            sent.append((value, int(structure.result_bytes(value, costs))))
        elif action.computes and action.op is Op.FORWARD:
            held[value] = int(structure.result_bytes(value, costs))
            if action.role is Role.STUDENT:
                held[value] += int(stash[action.stage] * structure.unit_scale(action, costs))
        most = max(most, sum(held.values()) + sum(size for value, size in sent if value not in held))
        for done in _done(action, structure):
            held.pop(done, None)
    return most


def _done(action: Action, structure: PipelineStructure) -> Iterator[Action]:
    """Yield the values, named by the work that made them, that are gone once an action has ended."""
    role, stage, unit, step = action.role, action.stage, action.microbatch, action.step
    last = len(structure.teacher_ranks) - 1
    if action.kind is Kind.SEND:
        assert action.peer is not None
        if lane(action.payload, action.peer, structure) is Lane.TEACHER:
            yield action.payload
    elif not action.computes or unit is None:
        return
    elif action.op is Op.FORWARD and role is Role.TEACHER:
        if stage:
            yield Action(role, stage - 1, Op.FORWARD, unit, step)
    elif action.op is Op.LOSS:
        for taught in structure.units_of_loss(unit, Role.TEACHER) if last >= 0 else ():
            yield Action(Role.TEACHER, last, Op.FORWARD, taught, step)
    elif action.op is structure.backward_ops[-1]:
        yield Action(role, stage, Op.FORWARD, unit, step)
        if stage:
            yield Action(role, stage - 1, Op.FORWARD, unit, step)
        if stage < structure.last:
            yield Action(role, stage + 1, structure.backward_ops[0], unit, step)
