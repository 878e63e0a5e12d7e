"""The pass that inserts reads of the data, sends and receives into rows of work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pipestill.schedule.action import Action, Lane, Op, Role
from pipestill.schedule.blockwise.structure import BlockwiseStructure
from pipestill.schedule.check import crossings, never_stuck
from pipestill.schedule.needs import lane, meets, needs
from pipestill.schedule.schedule import Row, Schedule, Structure


def connect(
    strategy: str, structure: Structure, rows: Sequence[Sequence[Action]], stash: tuple[int, ...], run_ahead: int
) -> Schedule:
    """Rows of work without transfers -> a schedule with its data reads, sends and receives.

    A send stands right after its work. A receive posts its buffer `lead` actions before the work that needs
    it; all receives use the smallest power of two that survives sends which block until their receive is posted, so
    that the schedule runs on any transport. The data is read (and every rank told its rows) one step before
    anything of that step is posted or run.
    """
    lead = 1
    longest = max(len(row) for row in rows)
    furthest = 1 + max((action.step for row in rows for action in row), default=0)
    while True:
        schedule = _connect(strategy, structure, rows, stash, run_ahead, lead)
        if lead > longest * furthest or never_stuck(schedule):
            return schedule
        lead *= 2


def _connect(
    strategy: str,
    structure: Structure,
    rows: Sequence[Sequence[Action]],
    stash: tuple[int, ...],
    run_ahead: int,
    lead: int,
) -> Schedule:
    destinations = defaultdict[Action, list[int]](list)
    for payload, _, destination in crossings(structure):
        destinations[payload].append(destination)
    order = {action.at(0): (index, action.step) for row in rows for index, action in enumerate(row)}
    connected = [_with_transfers(row, rank, structure, destinations, lead, order) for rank, row in enumerate(rows)]
    read = Action(Role.STUDENT, 0, Op.DATA, None, 1 + max((a.step for row in connected for a in row), default=0))
    reader = structure.rank_of(read)
    complete: list[Row] = []
    for rank, row in enumerate(connected):
        if rank == reader:
            head = [read, *(read.send_to(to) for to in sorted(destinations[read.at(0)]))]
        else:
            head = [read.receive_from(reader)]
        complete.append((*head, *row))
    return Schedule(strategy, structure, tuple(complete), stash, run_ahead)


def _with_transfers(
    row: Sequence[Action],
    rank: int,
    structure: Structure,
    destinations: dict[Action, list[int]],
    lead: int,
    order: dict[Action, tuple[int, int]],
) -> list[Action]:
    """One rank's row with sends after their work and receives `lead` actions before theirs (in the period before,
    and so one step further ahead, where the row is too short). `order`: where in its own row each work stands, and its step.
    """
    before = defaultdict[int, list[Action]](list)
    for need, moment in _posted(row, rank, structure, lead, order).items():
        periods, position = divmod(moment, len(row))
        before[position].append(need.receive_from(structure.rank_of(need)).at(-periods))
    out = []
    for index, action in enumerate(row):
        receives = before[index]  # of blocks these are in the order of their lanes
        if not isinstance(structure, BlockwiseStructure):
            # A period's own receives come after those of later periods that wrapped into it: lanes keep their order.
            receives = sorted(receives, key=lambda receive: receive.step)
        out += receives
        out.append(action)
        out += [action.send_to(to) for to in destinations.get(action.at(0), ())]
    return out


def _posted(
    row: Sequence[Action], rank: int, structure: Structure, lead: int, order: dict[Action, tuple[int, int]]
) -> dict[Action, int]:
    """When each result of another rank is announced, counted in actions of `row` from the start of its own period:
    `lead` before its first use, in its own period at the latest, and in the order in which its lane brings it.
    """
    moments: dict[Action, int] = {}
    for index, consumer in enumerate(row):
        for need in [] if meets(consumer) else needs(consumer, structure):
            if need.op is not Op.DATA and structure.rank_of(need) != rank:
                moment = min(index - need.step * len(row) - lead, len(row) - 1)
                moments[need.at(0)] = min(moment, moments.get(need.at(0), moment))
    if isinstance(structure, BlockwiseStructure):
        lanes = defaultdict[tuple[int, Lane], list[Action]](list)
        for need in sorted(moments, key=order.__getitem__):
            source = structure.rank_of(need)
            lanes[source, lane(need.receive_from(source), rank, structure)].append(need)
        moments = {n: m for needed in lanes.values() for n, m in _in_turn(needed, moments, order, len(row)).items()}
    return moments


def _in_turn(
    needed: list[Action], moments: dict[Action, int], order: dict[Action, tuple[int, int]], period: int
) -> dict[Action, int]:
    """Moments that are no later than wanted, and in the order in which one period sends `needed`, over and over."""
    ahead = {need: order[need][1] * period for need in needed}  # what one period sends is of different steps
    latest, turns = moments[needed[-1]] + ahead[needed[-1]], dict[Action, int]()
    for need in reversed(needed):
        latest = turns[need] = min(latest, moments[need] + ahead[need])
    first = turns[needed[0]]  # the next period's comes after all of this one's
    return {need: min(turns[need], first + period - 1) - ahead[need] for need in needed}


def edges(structure: Structure) -> set[tuple[int, int, Lane]]:
    """Every directed edge and lane on which tensors of a model or targets travel."""
    used = set[tuple[int, int, Lane]]()
    for payload, source, destination in crossings(structure):
        on = lane(payload.receive_from(source), destination, structure)
        if on is not Lane.DATA:
            used.add((source, destination, on))
        elif isinstance(structure, BlockwiseStructure):
            if structure.reads_samples(destination):
                used.add((source, destination, Lane.INPUT))
        elif destination == structure.student_ranks[structure.last]:
            used.add((source, destination, Lane.TARGET))
    return used
