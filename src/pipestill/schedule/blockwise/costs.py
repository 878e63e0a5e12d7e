"""How long work and transfers of blockwise training take, from a profile of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipestill.costs import Link
from pipestill.schedule.action import Role
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.schedule.blockwise.shares import Part, Share


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
        """How long a share's rows take: the forward of a teacher block, or a student block's whole step, update included."""
        known, rows = self.profile.blocks[block], self._rows(share.part)
        seconds = known.teacher(rows) if role is Role.TEACHER else known.student(rows)
        return seconds / (self.speeds[share.rank] if self.speeds else 1.0)

    def relay_seconds(self, block: int, part: Part) -> float:
        """How long rows of a teacher block's output take to arrive at another rank."""
        return self.link.seconds(self.profile.output_bytes_per_row(block) * self._rows(part))

    def move_seconds(self, block: int) -> float:
        """How long a student block takes to move to another rank."""
        return self.link.seconds(self.state_bytes(block))

    def state_bytes(self, block: int) -> float:
        """What moves with a student block: weights and optimizer state, which are taken to be as large where not known."""
        known = self.profile.blocks[block]
        return max(known.state_bytes - known.parameter_bytes, 0) or 2 * known.parameter_bytes

    def _rows(self, part: Part) -> float:
        """How many rows of a batch a part has, which need not be whole."""
        return float((part[1] - part[0]) * self.batch)
