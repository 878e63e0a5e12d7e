"""The structure of blockwise training: student blocks that are trained alone, and who takes which rows through every block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeVar

from pipestill.schedule.action import Action, Lane, Op, Role
from pipestill.schedule.blockwise.costs import BlockwiseCosts
from pipestill.schedule.blockwise.shares import (
    WHOLE,
    Part,
    Share,
    blocks_in,
    common,
    overlap,
    parse_shares,
    share_lines,
    tiles,
)
from pipestill.schedule.proof import Proof, Versions
from pipestill.schedule.text import Fields, parse_number, parse_truth, yes_or_no

S = TypeVar("S", bound="BlockwiseStructure")


@dataclass(frozen=True)
class BlockwiseStructure:
    """Everything that one step of blockwise training computes. A step is a `window` of batches.

    `teacher[i]` and `student[i]` are the shares of block i, batch by batch; an action's microbatch counts them. Student
    block i takes rows of teacher block i - 1's outputs (or of the samples) and is trained towards what teacher block i makes of
    them; a student block without shares is not trained. Where several ranks share a batch of a block, their gradients are
    added up. When another rank takes a student block's next batch, its weights and optimizer state move there first.

    `barrier`: every step waits for all updates of the one before. `ahead`: a teacher's outputs of a step wait until their
    receiver is done with those of `ahead` + 1 steps before, so that no more than these are ever held.
    """

    line_names: ClassVar[tuple[str, ...]] = ("ranks", "window", "ahead", "barrier")

    num_ranks: int
    window: int
    teacher: tuple[tuple[Share, ...], ...]
    student: tuple[tuple[Share, ...], ...]
    barrier: bool = False
    ahead: int = 1

    def __post_init__(self) -> None:
        if not self.teacher or len(self.teacher) != len(self.student):
            raise ValueError(
                f"{len(self.teacher)} teacher and {len(self.student)} student blocks; expected as many of both"
            )
        if self.window < 1 or self.ahead < 0:
            raise ValueError(f"a window of {self.window} batches, {self.ahead} steps ahead; expected at least 1 and 0")
        for shares in (*self.teacher, *self.student):
            for share in shares:
                if not (0 <= share.rank < self.num_ranks and 0 <= share.batch < self.window):
                    raise ValueError(f"share {share} for {self.num_ranks} ranks and a window of {self.window} batches")
            if [s.batch for s in shares] != sorted(s.batch for s in shares):
                raise ValueError("the shares of a block are not in the order of their batches")
        for i, shares in enumerate(self.student):
            for batch in range(self.window) if shares else ():
                if not tiles([s.part for s in shares if s.batch == batch], WHOLE):
                    raise ValueError(f"the shares of student block {i} are not all rows of batch {batch} once")
            if len({(s.batch, s.rank) for s in shares}) < len(shares):
                raise ValueError(f"a rank has several shares of one batch of student block {i}; expected one")
        idle = set(range(self.num_ranks)) - {s.rank for shares in (*self.teacher, *self.student) for s in shares}
        if idle:
            raise ValueError(f"{self.num_ranks} ranks, of which {', '.join(map(str, sorted(idle)))} have nothing to do")
        for role in Role:
            for i, shares in enumerate(self.shares(role)):
                for share in shares:
                    for block in _reads(role, i):
                        parts = [self.teacher[block][u].part for u in self.sources(block, share)]
                        if not tiles([common(part, share.part) for part in parts], share.part):
                            raise ValueError(
                                f"teacher block {block} does not have all rows once that {role.name.lower()} block {i} "
                                f"takes of batch {share.batch} on rank {share.rank}"
                            )

    @property
    def num_blocks(self) -> int:
        """How many blocks each model has."""
        return len(self.teacher)

    def shares(self, role: Role) -> tuple[tuple[Share, ...], ...]:
        """The shares of every block of a model."""
        return self.student if role is Role.STUDENT else self.teacher

    def share_of(self, action: Action) -> Share:
        """The share that an action takes, which its microbatch counts."""
        assert action.microbatch is not None
        return self.shares(action.role)[action.stage][action.microbatch]

    def rank_of(self, action: Action) -> int:
        """The rank that computes the payload of `action`; rank 0 reads the data."""
        return 0 if action.op is Op.DATA else self.share_of(action).rank

    def stages_of(self, rank: int, role: Role) -> list[int]:
        """The blocks of `role` that `rank` ever runs."""
        return [i for i, shares in enumerate(self.shares(role)) if any(s.rank == rank for s in shares)]

    def actions(self, step: int = 0) -> Iterator[Action]:
        """Every piece of work of one step, batch by batch, the teacher's first."""
        yield Action(Role.STUDENT, 0, Op.DATA, None, step)
        for batch in range(self.window):
            for i in range(self.num_blocks):
                yield from (Action(Role.TEACHER, i, Op.FORWARD, u, step) for u in self.of_batch(Role.TEACHER, i, batch))
            for i in range(self.num_blocks):
                units = self.of_batch(Role.STUDENT, i, batch)
                for op in (Op.BACKWARD, Op.REDUCE, Op.UPDATE) if len(units) > 1 else (Op.BACKWARD, Op.UPDATE):
                    yield from (Action(Role.STUDENT, i, op, u, step) for u in units)

    @cached_property
    def _by_batch(self) -> dict[tuple[Role, int, int], list[int]]:
        """The numbers of the shares of (model, block, batch)."""
        found = defaultdict[tuple[Role, int, int], list[int]](list)
        for role in Role:
            for i, shares in enumerate(self.shares(role)):
                for unit, share in enumerate(shares):
                    found[role, i, share.batch].append(unit)
        return dict(found)

    def of_batch(self, role: Role, block: int, batch: int) -> list[int]:
        """The numbers of the shares of one batch of a block."""
        return self._by_batch.get((role, block, batch), [])

    def needs(self, work: Action) -> list[Action]:
        """The work whose results `work` uses directly, in the order of a plain loop."""
        if work.op is Op.REDUCE:
            return [Action(a.role, a.stage, Op.BACKWARD, a.microbatch, a.step) for a in self.sharers(work)]
        if work.op is Op.UPDATE:
            return self._needs_of_update(work)
        before = [Action(Role.STUDENT, 0, Op.DATA, None, work.step), *self._teacher_outputs(work)]
        if work.op is Op.BACKWARD:
            before.append(self.before(work))
        else:  # a teacher's forward, whose outputs are received into a bounded number of buffers
            before += [a.at(work.step - 1 - self.ahead) for a in self.receipts.get(work.at(0), [])]
        if self.barrier and self.share_of(work).batch == 0:
            updates = (a.at(work.step - 1) for a in self.actions() if a.op is Op.UPDATE)
            before += [update for update in updates if update not in before]
        return before

    def _needs_of_update(self, work: Action) -> list[Action]:
        """An update needs the gradients of its share, added up where ranks share the batch."""
        op = Op.REDUCE if len(self.sharers(work)) > 1 else Op.BACKWARD
        return [Action(work.role, work.stage, op, work.microbatch, work.step)]

    def _teacher_outputs(self, work: Action) -> list[Action]:
        """The teacher's forwards whose outputs a forward or a student's step takes rows of."""
        share = self.share_of(work)
        return [
            Action(Role.TEACHER, block, Op.FORWARD, unit, work.step)
            for block in self.reads(work)
            if block >= 0
            for unit in self.sources(block, share)
        ]

    def sharers(self, work: Action) -> list[Action]:
        """The same work on every rank that shares the batch of a block with it, itself included."""
        units = self.of_batch(work.role, work.stage, self.share_of(work).batch)
        return [Action(work.role, work.stage, work.op, u, work.step) for u in units]

    def sources(self, block: int, share: Share) -> list[int]:
        """The shares of a teacher block whose outputs hold the rows of `share`: one on its own rank, if that has them all."""
        units = self.of_batch(Role.TEACHER, block, share.batch)
        mine = [
            u for u in units
            if (t := self.teacher[block][u]).rank == share.rank and t.part[0] <= share.part[0] and share.part[1] <= t.part[1]
        ]  # fmt: skip
        return mine[:1] or [u for u in units if overlap(self.teacher[block][u].part, share.part)]

    def reads(self, action: Action) -> list[int]:
        """The teacher blocks whose outputs a teacher's forward or a student's step takes (-1: the samples)."""
        return [action.stage - 1] if action.role is Role.TEACHER else [action.stage - 1, action.stage]

    @cached_property
    def relays(self) -> dict[tuple[Action, int], Part]:
        """(teacher forward, another rank) -> the rows of it that this rank needs."""
        found: dict[tuple[Action, int], Part] = {}
        for consumer, source, part in self._flows():
            if self.rank_of(source) != self.rank_of(consumer):
                key = source, self.rank_of(consumer)
                known = found.get(key, part)
                found[key] = min(known[0], part[0]), max(known[1], part[1])
        return found

    def _flows(self) -> Iterator[tuple[Action, Action, Part]]:
        """(work, a teacher forward that it takes rows of, which rows)."""
        for consumer in self.actions():
            if consumer.op in (Op.FORWARD, Op.BACKWARD):
                part = self.share_of(consumer).part
                for source in self._teacher_outputs(consumer):
                    yield consumer, source, common(self.share_of(source).part, part)

    @cached_property
    def receipts(self) -> dict[Action, list[Action]]:
        """For each teacher forward that is relayed, what each receiver has done once it is done with the rows."""
        found = defaultdict[Action, dict[int, Action]](dict)
        for consumer, source, _ in self._flows():
            rank = self.rank_of(consumer)
            if rank != self.rank_of(source):
                end = consumer
                if consumer.op is Op.BACKWARD:
                    end = Action(Role.STUDENT, consumer.stage, Op.UPDATE, consumer.microbatch, 0)
                found[source][rank] = end  # the last in the order of a plain loop: the student's, after the teacher's
        return {source: list(ends.values()) for source, ends in found.items()}

    def reads_samples(self, rank: int) -> bool:
        """Whether a rank takes samples through the first blocks."""
        return any(s.rank == rank for s in (*self.teacher[0], *self.student[0]))

    def before(self, action: Action) -> Action:
        """The update whose weights a student's step reads: on its own rank, or on the one they come from."""
        share = self.share_of(action)
        batch, step = (share.batch - 1, action.step) if share.batch else (self.window - 1, action.step - 1)
        units = self.of_batch(Role.STUDENT, action.stage, batch)
        own = [u for u in units if self.student[action.stage][u].rank == share.rank]
        return Action(Role.STUDENT, action.stage, Op.UPDATE, (own or units)[0], step)

    @cached_property
    def moves(self) -> frozenset[tuple[Action, int]]:
        """(update, another rank) after which a student block's weights and optimizer state go to that rank."""
        steps = [a for a in self.actions() if a.op is Op.BACKWARD]
        ends = [(self.before(a), self.rank_of(a)) for a in steps]
        return frozenset((end.at(0), rank) for end, rank in ends if self.rank_of(end) != rank)

    def lane(self, transfer: Action, destination: int) -> Lane:
        """The channel on which a result travels to rank `destination`: what carries no tensor is a token."""
        key = transfer.payload.at(0), destination
        return Lane.TEACHER if key in self.relays else Lane.STATE if key in self.moves else Lane.TOKEN

    def batch_lane(self, destination: int) -> Lane | None:
        """Samples go to the ranks that take rows through the first blocks."""
        return Lane.INPUT if self.reads_samples(destination) else None

    @property
    def receives_by_lane(self) -> bool:
        """True: what a lane carries in one period may belong to batches of different steps."""
        return True

    def prove(
        self, rows: Sequence[Sequence[Action]], num_steps: int, lookahead: int, stash: Sequence[int], run_ahead: int
    ) -> Proof:
        """The versions of the weights, which follow from the needs: a student's step waits for the update before it, on whatever
        rank that was, so that no order that can run reads another version.
        """
        versions = [Versions(k, tuple(range(k * self.window, (k + 1) * self.window)), (0,)) for k in range(num_steps)]
        return Proof((), tuple(versions), (0,) * self.num_ranks, lookahead, 0)

    def work_seconds(self, work: Action, costs: BlockwiseCosts) -> float:
        """How long `work` computes. A student's step has its update in it; reading the data is not counted."""
        if work.op in (Op.DATA, Op.UPDATE):
            return 0.0
        if work.op is Op.REDUCE:
            return costs.profile.allreduce_seconds(work.stage, len(self.sharers(work)))
        return costs.share_seconds(work.role, work.stage, self.share_of(work))

    def transfer_seconds(self, result: Action, destination: int, costs: BlockwiseCosts) -> float:
        """How long a result takes to arrive at a rank: rows for the next block, a block that moves, or a mere token."""
        key = result.payload.at(0), destination
        if key in self.relays:
            return costs.relay_seconds(result.stage, self.relays[key])
        return costs.move_seconds(result.stage) if key in self.moves else costs.link.seconds(0)

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
    def from_lines(cls: type[S], fields: Fields) -> S:
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
    def by_block(self) -> bool:
        """True: pictures tell the work apart by its block."""
        return True

    @property
    def batches_per_step(self) -> int:
        """A step takes a window of batches."""
        return self.window


def _reads(role: Role, block: int) -> list[int]:
    """The teacher blocks whose outputs a block takes, without the samples."""
    return [i for i in ((block - 1,) if role is Role.TEACHER else (block - 1, block)) if i >= 0]
