"""Schedules of blockwise training: teachers' outputs are relayed from rank to rank (Pipe-BD, Jang et al., DATE 2023).

    rank 0   T0F0 S0B0 S0U0                      relay: each rank owns blocks, passes the teacher's output on,
    rank 1        T1F0 S1B0 S1U0                 and trains its own student blocks on it
    rank 2             T2F0 T3F0 S2B0 S2U0 S3B0 S3U0

A period is one batch, or a window of batches when blocks move between ranks within it (`sliced`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.blockwise.shares import WHOLE, Part, Share, equal_shares
from pipestill.schedule.blockwise.structure import BlockwiseStructure
from pipestill.schedule.comms import connect
from pipestill.schedule.schedule import Schedule

Group = tuple[range, tuple[int, ...]]
"""Consecutive blocks, and the ranks that share every batch of them."""

AHEAD = 2
"""How many batches a teacher's outputs may wait for their receiver, where a period is one batch."""


def staged(strategy: str, groups: Sequence[Group], *, barrier: bool = False) -> Schedule[BlockwiseStructure]:
    """Each group runs the teacher forwards of its blocks and passes the last output on, then the steps of its student blocks.

    `barrier`: a step waits for all updates of the one before (Pipe-BD's relaying without decoupled updates).
    """
    owners = {block: ranks for blocks, ranks in groups for block in blocks}
    shares = tuple(equal_shares(owners[block]) for block in range(len(owners)))
    num_ranks = 1 + max(rank for _, ranks in groups for rank in ranks)
    structure = BlockwiseStructure(num_ranks, 1, shares, shares, barrier, AHEAD)
    return _connected(strategy, structure, [_row(structure, rank) for rank in range(num_ranks)])


def alone(strategy: str, block: int, num_ranks: int) -> Schedule[BlockwiseStructure]:
    """All ranks train one block, each on an equal part of the rows, for which it runs the teacher up to that block."""
    shares = equal_shares(range(num_ranks))
    untrained: tuple[tuple[Share, ...], ...] = ((),) * block
    structure = BlockwiseStructure(num_ranks, 1, (shares,) * (block + 1), (*untrained, shares), ahead=AHEAD)
    return _connected(strategy, structure, [_row(structure, rank) for rank in range(num_ranks)])


def _row(structure: BlockwiseStructure, rank: int) -> list[Action]:
    """The teacher's forwards and then the student's steps of a rank, in the order of the blocks."""
    return [a for a in structure.actions() if a.op is not Op.DATA and structure.rank_of(a) == rank]


def _connected(strategy: str, structure: BlockwiseStructure, rows: Sequence[Sequence[Action]]) -> Schedule[BlockwiseStructure]:
    """The rows with transfers. The teacher's run-ahead counts steps, and nothing is stashed between actions."""
    steps_ahead = max((a.step for row in rows for a in row), default=0)
    return connect(strategy, structure, rows, (0,) * structure.num_ranks, run_ahead=steps_ahead)


@dataclass(frozen=True, slots=True)
class Portion:
    """What one rank takes of a block in each window: a part of the rows of every one of `batches`."""

    rank: int
    batches: range
    part: Part = WHOLE


def sliced(
    window: int,
    teacher: Sequence[Sequence[Portion]],
    student: Sequence[Sequence[Portion]],
    num_ranks: int,
    *,
    teacher_first: bool,
) -> Schedule[BlockwiseStructure]:
    """A window of batches, in which a student block may move from one rank to another (McNaughton's wrap-around rule).

    A block that two ranks take in turn is the first thing that one of them does in a window, and the last thing of the
    other, so that they never wait for each other. To that end the teacher's forwards are those of the next window: all at
    the start of a window (`teacher_first`), or those of batch i before the student's steps of batch i.
    """

    def shares(portions: Sequence[Portion]) -> tuple[Share, ...]:
        """The shares of a block, batch by batch."""
        every = [Share(batch, p.rank, p.part) for p in portions for batch in p.batches]
        return tuple(sorted(every, key=lambda share: (share.batch, share.part)))

    structure = BlockwiseStructure(num_ranks, window, tuple(map(shares, teacher)), tuple(map(shares, student)))
    rows = []
    for rank in range(num_ranks):
        batch = {a: structure.share_of(a).batch for a in _row(structure, rank)}
        forwards = [a.at(1) for a in batch if a.role is Role.TEACHER]
        leaving, staying, arrived = list[Action](), list[Action](), list[Action]()  # student blocks: see the docstring
        for action in batch:
            if action.role is Role.STUDENT:
                portion = next(p for p in student[action.stage] if p.rank == rank and batch[action] in p.batches)
                stays = len(portion.batches) == window
                (staying if stays else leaving if portion.batches.start == 0 else arrived).append(action)
        middle = [*forwards, *staying]
        if not teacher_first:
            middle.sort(key=lambda a: (batch[a.at(0)], a.role is Role.STUDENT))
        rows.append([*leaving, *middle, *arrived])
    return _connected("balanced", structure, rows)
