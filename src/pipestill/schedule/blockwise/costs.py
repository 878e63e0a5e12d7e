"""What work and transfers of blockwise training take, from a profile of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipestill.costs import Link
from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.schedule.blockwise.structure import BlockwiseStructure, Part


@dataclass(frozen=True, slots=True)
class BlockwiseCosts:
    """A profile, the rows of a batch, and each rank's speed (work per second beside the profile's device; empty: alike)."""

    profile: BlockProfile
    batch: int
    speeds: tuple[float, ...] = ()

    def on(self, ranks: Sequence[int]) -> BlockwiseCosts:
        """The same for some of the ranks, counted from 0."""
        speeds = tuple(self.speeds[rank] for rank in ranks) if self.speeds else ()
        return BlockwiseCosts(self.profile, self.batch, speeds)

    @property
    def link(self) -> Link:
        return self.profile.link

    @property
    def interference(self) -> float:
        """Ranks do not disturb each other."""
        return 1.0

    def action_seconds(self, action: Action, structure: BlockwiseStructure) -> float:
        """How long `action` computes. A student's step has its update in it; reading the data is not counted."""
        if action.op in (Op.DATA, Op.UPDATE):
            return 0.0
        if action.op is Op.REDUCE:
            return self.profile.allreduce_seconds(action.stage, len(structure.sharers(action)))
        share = structure.share_of(action)
        block, rows = self.profile.blocks[action.stage], _rows(share.part, self.batch)
        seconds = block.teacher(rows) if action.role is Role.TEACHER else block.student(rows)
        return seconds / (self.speeds[share.rank] if self.speeds else 1.0)

    def transfer_seconds(self, transfer: Action, destination: int, structure: BlockwiseStructure) -> float:
        """How long the result of `transfer` takes to arrive at a rank: rows for the next block, or a block that moves."""
        key = transfer.payload.at(0), destination
        if key in structure.relays:
            per_row = self.profile.output_bytes_per_row(transfer.stage)
            return self.link.seconds(per_row * _rows(structure.relays[key], self.batch))
        return self.link.seconds(self.state_bytes(transfer.stage) if key in structure.moves else 0)

    def state_bytes(self, block: int) -> float:
        """What moves with a student block: weights and optimizer state, which are taken to be as large where not known."""
        known = self.profile.blocks[block]
        return max(known.state_bytes - known.parameter_bytes, 0) or 2 * known.parameter_bytes


def _rows(part: Part, batch: int) -> float:
    return float((part[1] - part[0]) * batch)
