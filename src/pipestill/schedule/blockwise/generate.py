"""Blockwise training: student blocks that learn alone from the teacher's blocks (Pipe-BD, Jang et al., DATE 2023).

    rank 0   T0F0 S0B0 S0U0                      relay: each rank owns blocks, passes the teacher's output on,
    rank 1        T1F0 S1B0 S1U0                 and trains its own student blocks on it
    rank 2             T2F0 T3F0 S2B0 S2U0 S3B0 S3U0

A period is one batch, or a window of batches when blocks move between ranks within it (`sliced`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.blockwise.shares import WHOLE, Share, equal_shares
from pipestill.schedule.blockwise.structure import BlockwiseStructure
from pipestill.schedule.comms import connect
from pipestill.schedule.schedule import Schedule

Group = tuple[range, tuple[int, ...]]
"""Consecutive blocks, and the ranks that share every batch of them."""

AHEAD = 2
"""Batches that a teacher's outputs may wait for their receiver, where a period is one batch."""


def staged(strategy: str, groups: Sequence[Group], *, barrier: bool = False) -> Schedule[BlockwiseStructure]:
    """Each group takes its blocks' teacher forwards first and passes the last on, then its student blocks' steps.

    `barrier`: a step waits for all updates of the one before (Pipe-BD's relaying without decoupled updates).
    """
    owners = {block: ranks for blocks, ranks in groups for block in blocks}
    shares = tuple(equal_shares(owners[block]) for block in range(len(owners)))
    num_ranks = 1 + max(rank for _, ranks in groups for rank in ranks)
    structure = BlockwiseStructure(num_ranks, 1, shares, shares, barrier, AHEAD)
    return _connected(strategy, structure, [_row(structure, rank) for rank in range(num_ranks)])


def alone(strategy: str, block: int, num_ranks: int) -> Schedule[BlockwiseStructure]:
    """One block is trained, by ranks that each hold an equal part of the rows and run the teacher up to it."""
    shares = equal_shares(range(num_ranks))
    structure = BlockwiseStructure(
        num_ranks, 1, (shares,) * (block + 1), ((),) * block + (shares,), ahead=AHEAD
    )  # fmt: skip
    return _connected(strategy, structure, [_row(structure, rank) for rank in range(num_ranks)])


def _row(structure: BlockwiseStructure, rank: int) -> list[Action]:
    """The teacher's forwards and then the student's steps of a rank, in the order of the blocks."""
    return [a for a in structure.actions() if a.op is not Op.DATA and structure.rank_of(a) == rank]


def _connected(
    strategy: str, structure: BlockwiseStructure, rows: Sequence[Sequence[Action]]
) -> Schedule[BlockwiseStructure]:
    lead = max((a.step for row in rows for a in row), default=0)
    return connect(strategy, structure, rows, (0,) * structure.num_ranks, run_ahead=lead)


@dataclass(frozen=True, slots=True)
class Portion:
    """What one rank takes of a block: `batches` of each window whole, or `part` of the rows of every batch."""

    rank: int
    batches: range
    part: tuple[Fraction, Fraction] = WHOLE


def sliced(
    window: int,
    teacher: Sequence[Sequence[Portion]],
    student: Sequence[Sequence[Portion]],
    num_ranks: int,
    *,
    teacher_first: bool,
) -> Schedule[BlockwiseStructure]:
    """A window of batches, in which a student block moves from one rank to another (McNaughton's wrap-around rule).

    A block that two ranks take in turn is the first thing that one of them does in a window, and the last of the
    other, so that they never wait for each other. To that end the teacher's forwards are of the window after: all at the
    start of a window (`teacher_first`), or each batch's before the student's steps of as many batches before.
    """

    def shares(portions: Sequence[Portion]) -> tuple[Share, ...]:
        every = [Share(batch, p.rank, p.part) for p in portions for batch in p.batches]
        return tuple(sorted(every, key=lambda share: (share.batch, share.part)))

    structure = BlockwiseStructure(num_ranks, window, tuple(map(shares, teacher)), tuple(map(shares, student)))
    rows = []
    for rank in range(num_ranks):
        work = _row(structure, rank)
        batch = {a: structure.share_of(a).batch for a in work}
        taught = [a.at(1) for a in work if a.role is Role.TEACHER]
        turns = {a: _turn(a, batch[a], student, window, rank) for a in work}
        first, last = ([a for a in work if turns[a] == turn] for turn in (0, 2))
        rest = [a for a in work if a.role is Role.STUDENT and turns[a] == 1]
        if teacher_first:
            rows.append([*first, *taught, *rest, *last])
        else:
            both = sorted([*taught, *rest], key=lambda a: (batch[a.at(0)], a.role is Role.STUDENT))
            rows.append([*first, *both, *last])
    return _connected("balanced", structure, rows)


def _turn(action: Action, batch: int, student: Sequence[Sequence[Portion]], window: int, rank: int) -> int:
    """0 for steps of a block that goes elsewhere within the window, 2 for those of one that came, 1 for all others."""
    if action.role is Role.TEACHER:
        return 1
    mine = next(p for p in student[action.stage] if p.rank == rank and batch in p.batches)
    return 1 if len(mine.batches) == window else 0 if mine.batches.start == 0 else 2
