"""Process groups of ranks that share batches of a block."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist

from pipestill.plan.blockwise.plan import BlockwisePlan
from pipestill.schedule import Op
from pipestill.schedule.blockwise.structure import BlockwiseStructure

Groups = dict[tuple[int, ...], dist.ProcessGroup]


def process_groups(plans: Iterable[BlockwisePlan]) -> Groups:
    """A process group for every set of ranks that share batches of a block, made on all ranks in the same order."""
    shared = set[tuple[int, ...]]()
    for phase in (phase for plan in plans for phase in plan.phases):
        structure = phase.schedule.structure
        assert isinstance(structure, BlockwiseStructure)
        for action in structure.actions():
            if action.op is Op.REDUCE:
                shared.add(tuple(phase.ranks[structure.rank_of(a)] for a in structure.sharers(action)))
    return {ranks: dist.new_group(list(ranks)) for ranks in sorted(shared)}
