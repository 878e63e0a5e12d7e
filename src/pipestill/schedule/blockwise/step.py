"""What one step of blockwise training computes: who takes which rows of which batch through every block."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.blockwise.shares import WHOLE, Part, Share, common, overlap, tiles


@dataclass(frozen=True)
class BlockwiseStep:
    """The work of one step, which is a `window` of batches; see `BlockwiseStructure`, which adds what waits for what.

    `teacher[i]` and `student[i]` are the shares of block i, batch by batch; an action's microbatch counts them. Student
    block i takes rows of teacher block i - 1's outputs (or of the samples) and is trained towards what teacher block i makes of
    them; a student block without shares is not trained. Where several ranks share a batch of a block, their gradients are
    added up. When another rank takes a student block's next batch, its weights and optimizer state move there first.

    `barrier`: every step waits for all updates of the one before. `ahead`: a teacher's outputs of a step wait until their
    receiver is done with those of `ahead` + 1 steps before, so that no more than these are ever held.
    """

    num_ranks: int
    window: int
    teacher: tuple[tuple[Share, ...], ...]
    student: tuple[tuple[Share, ...], ...]
    barrier: bool = False
    ahead: int = 1

    def __post_init__(self) -> None:
        if not self.teacher or len(self.teacher) != len(self.student):
            raise ValueError(f"{len(self.teacher)} teacher and {len(self.student)} student blocks; expected as many of both")
        if self.window < 1 or self.ahead < 0:
            raise ValueError(f"a window of {self.window} batches, {self.ahead} steps ahead; expected at least 1 and 0")
        self._check_shares()
        self._check_student()
        self._check_sources()

    def _check_shares(self) -> None:
        """Every share names a rank and a batch that exist, and a block's are in the order of their batches."""
        for shares in (*self.teacher, *self.student):
            for share in shares:
                if not (0 <= share.rank < self.num_ranks and 0 <= share.batch < self.window):
                    raise ValueError(f"share {share} for {self.num_ranks} ranks and a window of {self.window} batches")
            if [s.batch for s in shares] != sorted(s.batch for s in shares):
                raise ValueError("the shares of a block are not in the order of their batches")

    def _check_student(self) -> None:
        """A student block that is trained takes all rows of every batch, those of a rank in one piece; and no rank is idle."""
        for i, shares in enumerate(self.student):
            for batch in range(self.window) if shares else ():
                if not tiles([s.part for s in shares if s.batch == batch], WHOLE):
                    raise ValueError(f"the shares of student block {i} are not all rows of batch {batch} once")
            if len({(s.batch, s.rank) for s in shares}) < len(shares):
                raise ValueError(f"a rank has several shares of one batch of student block {i}; expected one")
        idle = set(range(self.num_ranks)) - {s.rank for shares in (*self.teacher, *self.student) for s in shares}
        if idle:
            raise ValueError(f"{self.num_ranks} ranks, of which {', '.join(map(str, sorted(idle)))} have nothing to do")

    def _check_sources(self) -> None:
        """Every row of a teacher block's output that a share takes is computed once."""
        for role in Role:
            for i, shares in enumerate(self.shares(role)):
                for share in shares:
                    for block in filter(lambda block: block >= 0, self.reads(role, i)):
                        parts = [self.teacher[block][u].part for u in self.sources(block, share)]
                        if not tiles([common(part, share.part) for part in parts], share.part):
                            raise ValueError(
                                f"teacher block {block} does not have all rows once that {role.name.lower()} block {i} "
                                f"takes of batch {share.batch} on rank {share.rank}"
                            )

    @property
    def num_blocks(self) -> int:
        """The number of each model's blocks."""
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

    def sources(self, block: int, share: Share) -> list[int]:
        """The shares of a teacher block whose outputs hold the rows of `share`: one on its own rank, if that has them all."""
        units = self.of_batch(Role.TEACHER, block, share.batch)
        mine = [
            u for u in units
            if (t := self.teacher[block][u]).rank == share.rank and t.part[0] <= share.part[0] and share.part[1] <= t.part[1]
        ]  # fmt: skip
        return mine[:1] or [u for u in units if overlap(self.teacher[block][u].part, share.part)]

    @staticmethod
    def reads(role: Role, block: int) -> list[int]:
        """The teacher blocks (-1: the samples) whose outputs a block takes, a student block's target last."""
        return [block - 1] if role is Role.TEACHER else [block - 1, block]

    def teacher_outputs(self, work: Action) -> list[Action]:
        """The teacher's forwards whose outputs a forward or a student's step takes rows of."""
        share = self.share_of(work)
        return [
            Action(Role.TEACHER, block, Op.FORWARD, unit, work.step)
            for block in self.reads(work.role, work.stage)
            if block >= 0
            for unit in self.sources(block, share)
        ]

    @cached_property
    def relays(self) -> dict[tuple[Action, int], Part]:
        """(teacher forward, another rank) -> the rows of it that this rank needs."""
        found: dict[tuple[Action, int], Part] = {}
        for consumer, source, part in self._flows():
            key = source, self.rank_of(consumer)
            known = found.get(key, part)
            found[key] = min(known[0], part[0]), max(known[1], part[1])
        return found

    def _flows(self) -> Iterator[tuple[Action, Action, Part]]:
        """(work, a teacher forward on another rank that it takes rows of, which rows)."""
        for consumer in self.actions():
            if consumer.op in (Op.FORWARD, Op.BACKWARD):
                part = self.share_of(consumer).part
                others = (a for a in self.teacher_outputs(consumer) if self.rank_of(a) != self.rank_of(consumer))
                for source in others:
                    yield consumer, source, common(self.share_of(source).part, part)

    @cached_property
    def receipts(self) -> dict[Action, list[Action]]:
        """For each teacher forward that is relayed, what each receiver has done once it is done with the rows."""
        found = defaultdict[Action, dict[int, Action]](dict)
        for consumer, source, _ in self._flows():
            end = replace(consumer, op=Op.UPDATE) if consumer.op is Op.BACKWARD else consumer
            found[source][self.rank_of(consumer)] = (
                end  # the last in the order of a plain loop: the student's, after the teacher's
            )
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
