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


_Held = tuple[Action, bool]
"""A value that is held: the work that made it, and whether it is of features rather than the work's output."""


def memory_bytes_of(
    schedule: Schedule[PipelineStructure], costs: Costs, stages: StageCosts, student_partition: Sequence[int],
    teacher_partition: Sequence[int],
) -> tuple[int, ...]:  # fmt: skip
    """The most bytes that each rank holds; () for costs that do not tell what blocks stash.

    They are the weights of both models' stages, the student's gradients and optimizer state, and at the worst moment of the
    rank's row: what each unit keeps from its forward to its backward, values that have arrived and are not yet used, the
    teacher's outputs and features that wait for their loss, gradients of features that wait for the backward, and the last
    values that the rank sent. What a kernel needs while it runs, and the framework itself, are not counted. `stages` are the
    same costs by stage.
    """
    if not costs.know_memory:
        return ()
    student = stage_blocks(costs.student, student_partition, "student")
    weights = [sum(b.parameter_bytes + b.training_bytes for b in blocks) for blocks in student]
    for rank, blocks in enumerate(stage_blocks(costs.teacher, teacher_partition, "teacher")):
        weights[rank] += sum(b.parameter_bytes for b in blocks)
    stash = [sum(b.stash_bytes for b in blocks) for blocks in student]
    sends = [sum(action.kind is Kind.SEND for action in row) for row in schedule.rows]
    rows = schedule.unroll(2 + schedule.lookahead + ceil(_SENDS_KEPT / max(1, *sends)))
    return tuple(w + _peak(rank, rows[rank], schedule.structure, stages, stash) for rank, w in enumerate(weights))


def _peak(rank: int, row: Sequence[Action], structure: PipelineStructure, costs: StageCosts, stash: Sequence[int]) -> int:
    """The most bytes that values take on a rank, over enough steps for every order that its row can produce."""
    held = dict[_Held, int]()
    sent = deque[tuple[_Held, int]](maxlen=_SENDS_KEPT)
    most = 0
    for action in row:
        value = action.payload
        destination = rank if action.kind is Kind.RECEIVE or action.peer is None else action.peer
        is_message = not action.computes and lane(value, destination, structure) in _VALUES
        output, features = int(structure.result_bytes(value, costs)), int(structure.feature_bytes(value, destination, costs))
        if is_message:
            passed = value.role is Role.STUDENT or structure.passes_output(value.stage, destination)
            parts: list[tuple[_Held, int]] = [((value, False), output * passed), ((value, True), features)]
            if action.kind is Kind.RECEIVE:
                held |= parts
            else:
                sent += [(part, size) for part, size in parts if size]
        elif action.computes and action.op is Op.FORWARD:
            held |= {(value, False): output, (value, True): features}
            if action.role is Role.STUDENT:
                held[value, False] += int(stash[action.stage] * structure.unit_scale(action, costs))
        elif action.computes and action.op is Op.LOSS and costs.feature_gradient_bytes:
            gradients = zip(structure.features, costs.feature_gradient_bytes, strict=True)
            size = sum(size for (student, _), size in gradients if student == action.stage)
            for unit in structure.units_of_loss(action.microbatch or 0, Role.STUDENT):
                forward = Action(Role.STUDENT, action.stage, Op.FORWARD, unit, action.step)
                held[forward, True] = int(size * structure.unit_scale(forward, costs))
        most = max(most, sum(held.values()) + sum(size for value, size in sent if value not in held))
        for done in _done(action, structure):
            held.pop(done, None)
    return most


def _done(action: Action, structure: PipelineStructure) -> Iterator[_Held]:
    """Yield the values that are gone once an action has ended."""
    role, stage, unit, step = action.role, action.stage, action.microbatch, action.step
    last = len(structure.teacher_ranks) - 1
    if action.kind is Kind.SEND:
        assert action.peer is not None
        if lane(action.payload, action.peer, structure) is Lane.TEACHER and structure.passes_output(stage, action.peer):
            yield action.payload, False
    elif not action.computes or unit is None:
        return
    elif action.op is Op.FORWARD and role is Role.TEACHER:
        if stage:
            yield Action(role, stage - 1, Op.FORWARD, unit, step), False
    elif action.op is Op.LOSS:
        for teacher in structure.taught_by(stage):
            for taught in structure.units_of_loss(unit, Role.TEACHER):
                forward = Action(Role.TEACHER, teacher, Op.FORWARD, taught, step)
                yield forward, True
                if teacher == last and stage == structure.last:
                    yield forward, False
    elif action.op is structure.backward_ops[-1]:
        yield Action(role, stage, Op.FORWARD, unit, step), False
        yield Action(role, stage, Op.FORWARD, unit, step), True
        if stage:
            yield Action(role, stage - 1, Op.FORWARD, unit, step), False
        if stage < structure.last:
            yield Action(role, stage + 1, structure.backward_ops[0], unit, step), False
