"""Which ranks of a blockwise plan exchange what: edges of messages, and process groups that share batches of a block."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist

from pipestill.plan.blockwise.plan import BlockwisePlan
from pipestill.schedule import Lane, Op
from pipestill.schedule.comms import edges

Groups = dict[tuple[int, ...], dist.ProcessGroup]


def plan_edges(plan: BlockwisePlan) -> set[tuple[int, int, Lane]]:
    """Every directed edge and lane of all phases of a plan, between ranks as the world counts them."""
    return {
        (phase.ranks[source], phase.ranks[destination], lane)
        for phase in plan.phases
        for source, destination, lane in edges(phase.schedule.structure)
    }


def process_groups(plans: Iterable[BlockwisePlan]) -> Groups:
    """A process group for every set of ranks that share batches of a block, made on all ranks in the same order."""
    shared = set[tuple[int, ...]]()
    for phase in (phase for plan in plans for phase in plan.phases):
        structure = phase.schedule.structure
        for action in structure.actions():
            if action.op is Op.REDUCE:
                shared.add(tuple(phase.ranks[structure.rank_of(a)] for a in structure.sharers(action)))
    return {ranks: dist.new_group(list(ranks)) for ranks in sorted(shared)}
