"""What each action waits for, and on which lane its result travels.

This module knows what is true of every kind of training: transfers, and reads of the data. The rest is said by the kinds
themselves, in `pipeline/needs.py` and `blockwise/structure.py`.
"""

from __future__ import annotations

from pipestill.schedule.action import Action, Kind, Lane, Op, Role
from pipestill.schedule.structure import Structure


def needs(action: Action, structure: Structure) -> list[Action]:
    """The work whose results `action` uses directly, in the order in which a plain loop would do it.

    A receive waits for its step's data, since a batch's row counts size the buffer; a send waits for the work it carries.
    Actions of steps before 0 are left to the caller.
    """
    if action.kind is Kind.SEND:
        return [action.payload]
    if action.kind is Kind.RECEIVE:
        return [] if action.op is Op.DATA else [Action(Role.STUDENT, 0, Op.DATA, None, action.step)]
    if action.op is Op.DATA:
        return [action.at(action.step - 1)]
    return structure.needs(action)


def meets(action: Action) -> bool:
    """Whether what an action needs of other ranks reaches it by a collective, and not by sends and receives."""
    return action.op is Op.REDUCE


def lane(transfer: Action, destination: int, structure: Structure) -> Lane:
    """The channel of the edge to rank `destination` on which `transfer` (a send or a receive) travels."""
    return Lane.DATA if transfer.op is Op.DATA else structure.lane(transfer, destination)


def crossings(structure: Structure) -> list[tuple[Action, int, int]]:
    """(work, its rank, another rank that needs its result), once each, in the order of a plain loop's consumers."""
    seen: dict[tuple[Action, int, int], None] = {}
    for consumer in structure.actions():
        destination = structure.rank_of(consumer)
        for need in [] if meets(consumer) else needs(consumer, structure):
            source = structure.rank_of(need)
            if source != destination:
                seen[need.at(0), source, destination] = None
    return list(seen)
