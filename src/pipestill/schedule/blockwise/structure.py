"""The structure of blockwise training: what waits for what, what travels between ranks, and how long that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pipestill.costs import Link
from pipestill.schedule.action import Action, Lane, Op, Role
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.schedule.blockwise.shares import Part, Share, blocks_in, parse_shares, share_lines
from pipestill.schedule.blockwise.step import BlockwiseStep
from pipestill.schedule.structure import Proof, Versions
from pipestill.schedule.text import Fields, parse_number, parse_truth, yes_or_no


@dataclass(frozen=True, slots=True)
class BlockwiseCosts:
    """A profile of blocks, the rows of a batch, and the speed of each rank.

    `speeds[r]` is the work that rank r does in the time in which the profile's device does one; empty: all are like it.
    """

    profile: BlockProfile
    batch: int
    speeds: tuple[float, ...] = ()

    def on(self, ranks: Sequence[int]) -> BlockwiseCosts:
        """The costs of some of the ranks, which are then counted from 0."""
        speeds = tuple(self.speeds[rank] for rank in ranks) if self.speeds else ()
        return BlockwiseCosts(self.profile, self.batch, speeds)

    @property
    def link(self) -> Link:
        """The link between any two ranks."""
        return self.profile.link

    @property
    def interference(self) -> float:
        """Always 1: ranks do not disturb each other."""
        return 1.0

    def share_seconds(self, role: Role, block: int, share: Share) -> float:
        """Seconds that a share's rows take: the forward of a teacher block, or a student block's whole step, update included."""
        known, rows = self.profile.blocks[block], self.rows(share.part)
        seconds = known.teacher(rows) if role is Role.TEACHER else known.student(rows)
        return seconds / (self.speeds[share.rank] if self.speeds else 1.0)

    def state_bytes(self, block: int) -> float:
        """Bytes that move with a student block: weights and optimizer state, which are taken to be as large where not known."""
        known = self.profile.blocks[block]
        return max(known.state_bytes - known.parameter_bytes, 0) or 2 * known.parameter_bytes

    def rows(self, part: Part) -> float:
        """Count the rows of a batch that a part has, which need not be whole."""
        return float((part[1] - part[0]) * self.batch)


@dataclass(frozen=True)
class BlockwiseStructure(BlockwiseStep):
    """Everything that one step of blockwise training computes, and what waits for what (fields: see `BlockwiseStep`)."""

    line_names: ClassVar[tuple[str, ...]] = ("ranks", "window", "ahead", "barrier")
    receives_by_lane: ClassVar[bool] = True  # what a lane carries in one period may belong to batches of different steps
    by_block: ClassVar[bool] = True

    def needs(self, work: Action) -> list[Action]:
        """The work whose results `work` uses directly, in the order of a plain loop."""
        if work.op is Op.REDUCE:
            return [Action(a.role, a.stage, Op.BACKWARD, a.microbatch, a.step) for a in self.sharers(work)]
        if work.op is Op.UPDATE:  # the gradients of its share, added up where ranks share the batch
            op = Op.REDUCE if len(self.sharers(work)) > 1 else Op.BACKWARD
            return [Action(work.role, work.stage, op, work.microbatch, work.step)]
        before = [Action(Role.STUDENT, 0, Op.DATA, None, work.step), *self.teacher_outputs(work)]
        if work.op is Op.BACKWARD:
            before.append(self.before(work))
        else:  # a teacher's forward, whose outputs are received into a bounded number of buffers
            before += [a.at(work.step - 1 - self.ahead) for a in self.receipts.get(work.at(0), [])]
        if self.barrier and self.share_of(work).batch == 0:
            updates = (a.at(work.step - 1) for a in self.actions() if a.op is Op.UPDATE)
            before += [update for update in updates if update not in before]
        return before

    def sharers(self, work: Action) -> list[Action]:
        """The same work on every rank that shares the batch of a block with it, itself included."""
        units = self.of_batch(work.role, work.stage, self.share_of(work).batch)
        return [Action(work.role, work.stage, work.op, u, work.step) for u in units]

    def lane(self, transfer: Action, destination: int) -> Lane:
        """The channel on which a result travels to rank `destination`: what carries no tensor is a token."""
        key = transfer.payload.at(0), destination
        return Lane.TEACHER if key in self.relays else Lane.STATE if key in self.moves else Lane.TOKEN

    def batch_lane(self, destination: int) -> Lane | None:
        """Samples go to the ranks that take rows through the first blocks."""
        return Lane.INPUT if self.reads_samples(destination) else None

    def prove(
        self, rows: Sequence[Sequence[Action]], num_steps: int, lookahead: int, stash: Sequence[int], run_ahead: int
    ) -> Proof:
        """The versions of the weights, which follow from the needs.

        A student's step waits for the update before it, on whatever rank that was, so that no order that can run reads
        another version. `run_ahead` is proved to be bounded by the needs, too: it is the period's lookahead.
        """
        versions = [Versions(k, tuple(range(k * self.window, (k + 1) * self.window)), (0,)) for k in range(num_steps)]
        return Proof((), tuple(versions), (0,) * self.num_ranks, lookahead, 0)

    def work_seconds(self, work: Action, costs: BlockwiseCosts) -> float:
        """Seconds that `work` computes. A student's step has its update in it; reading the data is not counted."""
        if work.op in (Op.DATA, Op.UPDATE):
            return 0.0
        if work.op is Op.REDUCE:
            return costs.profile.allreduce_seconds(work.stage, len(self.sharers(work)))
        return costs.share_seconds(work.role, work.stage, self.share_of(work))

    def transfer_seconds(self, result: Action, destination: int, costs: BlockwiseCosts) -> float:
        """Seconds until a result arrives at a rank: rows for the next block, a block that moves, or a mere token."""
        key = result.payload.at(0), destination
        moved = 0.0
        if key in self.relays:
            moved = costs.profile.output_bytes_per_row(result.stage) * costs.rows(self.relays[key])
        elif key in self.moves:
            moved = costs.state_bytes(result.stage)
        return costs.link.seconds(moved)

    def lines(self) -> list[str]:
        """The lines of a schedule's text that `from_lines` reads back."""
        return [
            f"ranks: {self.num_ranks}",
            f"window: {self.window}",
            f"barrier: {yes_or_no(self.barrier)}",
            f"ahead: {self.ahead}",
            *share_lines("teacher", self.teacher),
            *share_lines("student", self.student),
        ]

    @classmethod
    def from_lines(cls, fields: Fields) -> BlockwiseStructure:
        """Read back `lines`."""
        blocks = blocks_in(fields)  # a gap among them is a missing line
        return cls(
            num_ranks=parse_number("ranks", fields),
            window=parse_number("window", fields),
            teacher=tuple(parse_shares(f"teacher {i}", fields) for i in blocks),
            student=tuple(parse_shares(f"student {i}", fields) for i in blocks),
            barrier=parse_truth("barrier", fields),
            ahead=parse_number("ahead", fields),
        )

    def label(self, action: Action) -> str:
        """`T3` and `B3` of block 3; of blocks with several shares the number of the share too, as in `B3.1`."""
        if action.op is Op.DATA:
            return "D"
        letter = "T" if action.role is Role.TEACHER else action.op.value
        several = len(self.shares(action.role)[action.stage]) > 1
        return f"{letter}{action.stage}{f'.{action.microbatch}' if several else ''}"

    @property
    def batches_per_step(self) -> int:
        """A step takes a window of batches."""
        return self.window
