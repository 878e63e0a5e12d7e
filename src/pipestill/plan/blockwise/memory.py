"""The memory of blockwise training: what a schedule makes each rank hold at its worst moment."""

from collections import Counter
from collections.abc import Iterator

from pipestill.schedule import Action, Kind, Op, Role, Schedule
from pipestill.schedule.blockwise.shares import Part, rows_of_part
from pipestill.schedule.blockwise.structure import BlockwiseCosts, BlockwiseStructure


def memory_bytes_of(schedule: Schedule[BlockwiseStructure], costs: BlockwiseCosts) -> tuple[int, ...]:
    """The most bytes that each rank holds, from what the profile's blocks hold.

    They are the state of every block that a rank ever runs; the teacher's outputs, from their forward or the post of their
    receive until the rank has used or sent them; `ahead` more steps of those that are relayed, which may wait for their
    receiver (where no barrier is between steps); and the activations of one student's step at a time. Samples wait on the host.
    """
    structure = schedule.structure
    return tuple(_state(structure, rank, costs) + _peak(schedule, rank, costs) for rank in range(structure.num_ranks))


def _state(structure: BlockwiseStructure, rank: int, costs: BlockwiseCosts) -> int:
    """Bytes of weights, gradients and optimizer states of all blocks that a rank ever runs."""
    blocks = costs.profile.blocks
    return sum(blocks[i].teacher_bytes for i in structure.stages_of(rank, Role.TEACHER)) + sum(
        blocks[i].state_bytes for i in structure.stages_of(rank, Role.STUDENT)
    )


def _peak(schedule: Schedule[BlockwiseStructure], rank: int, costs: BlockwiseCosts) -> int:
    """The most that outputs and activations take, over enough steps for every order that the row can produce."""
    structure = schedule.structure
    blocks = costs.profile.blocks
    relayed = {source for source, _ in structure.relays}

    def output(action: Action, part: Part) -> int:
        return int(_rows(part, costs.batch) * costs.profile.output_bytes_per_row(action.stage))

    def used(action: Action) -> Iterator[Action]:
        if action.kind is Kind.SEND and action.payload.at(0) in relayed:
            yield action.payload
        elif action.computes and action.op in (Op.FORWARD, Op.BACKWARD):
            for block in structure.reads(action.role, action.stage):
                for unit in structure.sources(block, structure.share_of(action)) if block >= 0 else ():
                    yield Action(Role.TEACHER, block, Op.FORWARD, unit, action.step)

    row = schedule.rows[rank]
    uses = Counter(source.at(0) for action in row for source in used(action))
    ahead = 0 if structure.barrier else structure.ahead
    waiting = sum(
        ahead * output(action, structure.share_of(action).part) for action in row if action.computes and action.at(0) in relayed
    )
    held, left, most = dict[Action, int](), dict[Action, int](), 0
    for action in schedule.unroll(2 + schedule.lookahead)[rank]:
        taken = 0
        payload = action.payload
        if action.op in (Op.FORWARD, Op.BACKWARD) and action.computes:
            part = structure.share_of(action).part
            rows, block = _rows(part, costs.batch), blocks[action.stage]
            taken += block.input_bytes_per_row * rows if action.stage == 0 else 0  # samples
            taken += block.activation_bytes_per_row * rows if action.op is Op.BACKWARD else 0
            if action.op is Op.FORWARD:
                held[action], left[action] = output(action, part), uses[action.at(0)]
        elif action.kind is Kind.RECEIVE and (payload.at(0), rank) in structure.relays:
            held[payload] = output(payload, structure.relays[payload.at(0), rank])
            left[payload] = uses[payload.at(0)]
        most = max(most, taken + sum(held.values()))
        for source in used(action):
            left[source] -= 1
        held = {source: size for source, size in held.items() if left[source]}
    return most + waiting


def _rows(part: Part, batch: int) -> int:
    """Count the rows of a batch that a part has."""
    rows = rows_of_part(part, batch)
    return int(rows.stop - rows.start)
