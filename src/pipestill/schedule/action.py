"""Actions, the atoms of a schedule: one piece of work, or one transfer of its result.

S2F0@1      student, stage 2, forward, microbatch 0, step 1
T0F3@2      teacher, stage 0, forward, microbatch 3, step 2
S2I0@1      the first half of its backward, the gradient of its input; S2W0@1 is the second half, the gradients of its weights
S1U@4       student, stage 1, optimizer update of step 4 (no microbatch)
T1E@4       teacher, stage 1, moves its weights towards the student's after that update (no microbatch)
S1U2@4      blockwise training: the update of block 1 after share 2 of a window
S2R1@1      blockwise training: adds up the gradients of block 2 with the ranks that share its batch
S2F0@1>3    send the result of S2F0@1 to rank 3
S2F0@1<2    receive the result of S2F0@1 from rank 2
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class Role(str, Enum):
    """The model that an action belongs to."""

    __hash__ = str.__hash__  # Enum's own is a Python function; schedules hash actions by the million

    STUDENT = "S"
    TEACHER = "T"


class Op(str, Enum):
    """The kind of work.

    `DATA` reads a batch; it belongs to student stage 0 and feeds both models and the loss. A backward is one `BACKWARD`, or
    an `INPUT` (the gradient of the stage's input, for which the stage before waits) and later a `WEIGHT` (the gradients of its
    weights, for which only the update waits). `GATHER` gives the gradients of weights that other stages have too. `NORM` sums
    up a stage's squared gradients for clipping by their global norm. `EMA` is the update of a momentum teacher. In blockwise
    training a student's `BACKWARD` is its forward, loss and backward, which nothing separates, and `REDUCE` adds up the
    gradients of ranks that share a batch.
    """

    __hash__ = str.__hash__

    DATA = "D"
    FORWARD = "F"
    LOSS = "L"
    BACKWARD = "B"
    INPUT = "I"
    WEIGHT = "W"
    REDUCE = "R"
    GATHER = "G"
    NORM = "N"
    UPDATE = "U"
    EMA = "E"

    @property
    def per_microbatch(self) -> bool:
        """Whether the op is done once for each microbatch (else once a step)."""
        return self in _PER_MICROBATCH


_PER_MICROBATCH = frozenset((Op.FORWARD, Op.LOSS, Op.BACKWARD, Op.INPUT, Op.WEIGHT, Op.REDUCE))
_TEACHER_OPS = frozenset((Op.FORWARD, Op.EMA))


class Kind(str, Enum):
    """Whether an action computes, or sends or receives the result of another action."""

    __hash__ = str.__hash__

    COMPUTE = ""
    SEND = ">"
    RECEIVE = "<"


class Lane(str, Enum):
    """An ordered channel from one rank to another; it says what its transfers carry.

    `DATA`: the row counts of a batch, whose targets follow on `TARGET` and whose samples follow on `INPUT`. `TEACHER`,
    `ACTIVATION`: outputs of a teacher's and a student's stage. `GRADIENT`: the gradient of a stage's input. `TOKEN`:
    nothing; only its arrival matters. `TIE`: gradients of weights that several stages have. `NORM`: the squared gradients of a
    stage. `STATE`: a student block that moves to another rank. `REDUCE`: gradients that ranks in one process add up. `REPORT`:
    losses and metrics for rank 0, beside the schedule.
    """

    DATA = "data"
    TEACHER = "teacher"
    ACTIVATION = "activation"
    GRADIENT = "gradient"
    TOKEN = "token"
    TIE = "tie"
    NORM = "norm"
    TARGET = "target"
    INPUT = "input"
    STATE = "state"
    REDUCE = "reduce"
    REPORT = "report"


_TEXT = re.compile(
    r"(?P<role>[ST])(?P<stage>#)(?P<op>[DFLBIWRGNUE])(?P<microbatch>#|)@(?P<step>#)(?:(?P<kind>[<>])(?P<peer>#))?".replace(
        "#", "(?:0|[1-9][0-9]{0,8})"
    )
)


@dataclass(frozen=True, slots=True)
class Action:
    """The smallest piece of scheduled work or one transfer of its result. It prints and parses as in the module docstring.

    `stage` counts the stages of one model, or its blocks in blockwise training. `microbatch` is None for work that is done
    once a step. It counts units of a microbatch in one view (see `PipelineStep`), evaluations of the loss for a `LOSS`, and
    shares of a block in blockwise training (see `BlockwiseStructure`). `peer` is the other rank of a transfer. `step` counts
    from the period's own step in the rows of a `Schedule`, and from the start of the run in unrolled rows and traces.
    """

    role: Role
    stage: int
    op: Op
    microbatch: int | None
    step: int
    kind: Kind = Kind.COMPUTE
    peer: int | None = None

    def __post_init__(self) -> None:
        if (self.microbatch is not None) != (self.op in _PER_MICROBATCH) and self.op is not Op.UPDATE:
            raise ValueError(f"op {self.op.name} {'needs' if self.op.per_microbatch else 'takes no'} microbatch")
        if (self.peer is None) != (self.kind is Kind.COMPUTE):
            raise ValueError("exactly the transfers name a peer")
        if self.role is Role.TEACHER and self.op not in _TEACHER_OPS:
            raise ValueError(f"the teacher only runs forward and moves its weights, not {self.op.name}")
        if self.role is Role.STUDENT and self.op is Op.EMA:
            raise ValueError("only the teacher's weights are an average of others")

    def __str__(self) -> str:
        microbatch = "" if self.microbatch is None else self.microbatch
        peer = "" if self.peer is None else f"{self.kind.value}{self.peer}"
        return f"{self.role.value}{self.stage}{self.op.value}{microbatch}@{self.step}{peer}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that prints as `text`; `ValueError` when there is none."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"'{text}' is not an action; expected something like S2F0@1, S1U@4 or S2F0@1>3")
        microbatch, peer = match["microbatch"], match["peer"]
        try:
            return cls(
                role=Role(match["role"]),
                stage=int(match["stage"]),
                op=Op(match["op"]),
                microbatch=int(microbatch) if microbatch else None,
                step=int(match["step"]),
                kind=Kind(match["kind"] or ""),
                peer=int(peer) if peer is not None else None,
            )
        except ValueError as error:
            raise ValueError(f"'{text}' is not an action: {error}") from None

    @property
    def computes(self) -> bool:
        """Whether this is work rather than a transfer."""
        return self.kind is Kind.COMPUTE

    @property
    def payload(self) -> Action:
        """The work whose result this transfer carries (itself, when it is work)."""
        return self if self.computes else Action(self.role, self.stage, self.op, self.microbatch, self.step)

    def send_to(self, rank: int) -> Action:
        """The transfer of this work's result to `rank`."""
        return Action(self.role, self.stage, self.op, self.microbatch, self.step, Kind.SEND, rank)

    def receive_from(self, rank: int) -> Action:
        """The arrival of this work's result from `rank`."""
        return Action(self.role, self.stage, self.op, self.microbatch, self.step, Kind.RECEIVE, rank)

    def at(self, step: int) -> Action:
        """The same action in another step."""
        if step == self.step:
            return self
        return Action(self.role, self.stage, self.op, self.microbatch, step, self.kind, self.peer)
