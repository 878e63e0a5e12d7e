"""Messages between ranks: what each carries, the tag by which it is told from all others, the queue in which it waits."""

from dataclasses import dataclass

from pipestill.schedule import Action, Lane, Op, Role

_LANES = list(Lane)
_OPS = list(Op)
_BESIDE = (Lane.TARGET, Lane.INPUT, Lane.REPORT)
"""Lanes whose receives are announced step by step, apart from the schedule."""

_SHARED_BY_STAGES = (Lane.TEACHER, Lane.TOKEN, Lane.STATE)
"""Lanes between two ranks that carry results of several stages or blocks."""

# How many values of each kind a tag tells apart; their product, with lanes, roles and ops, stays below 2^31.
_SEGMENTS = 8  # 0, and 7 for the others in turn: a validation may never be taken for training
_STEPS = 64  # more than are ever under way at once
_MICROBATCHES = 1024  # and one for none
_PARTS = 15  # tensors of a message; later ones keep their order behind those of the same tag
_STAGE_STRIDE = 131  # spreads the microbatches of the stages that share a lane

UNDER_WAY = 32
"""How many sends of a queue may be on their way before one waits until the oldest has been taken."""

Queue = tuple[int, bool]
"""Segment, and whether beside the schedule. A proved schedule runs even if every send waits for its receive, so waiting for the
oldest is safe; one beside it may be awaited by a rank that first needs more of the schedule.
"""


@dataclass(frozen=True, slots=True)
class Message:
    """One transfer between two ranks.

    `segment` is the part of the run that it belongs to, in which steps count from 0; one executor runs one segment. In a
    pipeline run, training is segment 0 and its validations are 1, 2, ...; in a blockwise run, the segment is the number of
    the phase.
    """

    lane: Lane
    payload: Action
    source: int
    destination: int
    segment: int = 0

    def __str__(self) -> str:
        where = f" of validation or phase {self.segment}" if self.segment else ""
        return f"{self.payload}{where} from rank {self.source} on the {self.lane.value} lane"


def queue_of(message: Message) -> Queue:
    """The queue in which a message waits to be taken."""
    return message.segment, message.lane in _BESIDE


def tag(message: Message, part: int) -> int:
    """The number, below 2^31, by which gloo matches a tensor of a message with its receive.

    It differs between lanes, segments, and steps that are under way at once. Two messages of one lane and step have the same tag
    only where there are more than `_MICROBATCHES`; that is safe, since receives of a lane are posted in the order of its sends.
    """
    action = message.payload
    segment = 1 + (message.segment - 1) % (_SEGMENTS - 1) if message.segment else 0
    microbatch = 0 if action.microbatch is None else action.microbatch + 1
    if message.lane in _SHARED_BY_STAGES:
        microbatch += _STAGE_STRIDE * action.stage
    number = 0
    for digit, base in (
        (segment, _SEGMENTS), (_LANES.index(message.lane), len(_LANES)), (action.role is Role.TEACHER, 2),
        (_OPS.index(action.op), len(_OPS)), (action.step, _STEPS), (microbatch, _MICROBATCHES), (part, _PARTS),
    ):  # fmt: skip
        number = number * base + digit % base
    return number
