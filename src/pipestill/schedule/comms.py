"""The pass that inserts reads of the data, sends and receives into rows of work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pipestill.schedule.action import Action, Lane, Op, Role
from pipestill.schedule.check import crossings, never_stuck
from pipestill.schedule.needs import lane, needs
from pipestill.schedule.program import Row, Schedule, Structure


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
    connected = [_with_transfers(row, rank, structure, destinations, lead) for rank, row in enumerate(rows)]
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
    row: Sequence[Action], rank: int, structure: Structure, destinations: dict[Action, list[int]], lead: int
) -> list[Action]:
    """One rank's row with sends after their work and receives `lead` actions before theirs (in the period before,
    and so one step further ahead, where the row is too short).
    """
    before = defaultdict[int, list[Action]](list)
    known = set[Action]()
    for index, consumer in enumerate(row):
        for need in needs(consumer, structure):
            source = structure.rank_of(need)
            if need.op is Op.DATA or source == rank or need in known:
                continue
            known.add(need)
            periods, position = divmod(index - lead, len(row))
            before[position].append(need.receive_from(source).at(need.step - periods))
    out = []
    for index, action in enumerate(row):
        # A period's own receives come after those of later periods that wrapped into it: lanes keep their order.
        out += sorted(before[index], key=lambda receive: receive.step)
        out.append(action)
        out += [action.send_to(to) for to in destinations.get(action.at(0), ())]
    return out


def edges(structure: Structure) -> set[tuple[int, int, Lane]]:
    """Every directed edge and lane on which tensors of a model or targets travel."""
    used = set[tuple[int, int, Lane]]()
    for payload, source, destination in crossings(structure):
        on = lane(payload.receive_from(source), destination, structure)
        if on is not Lane.DATA:
            used.add((source, destination, on))
        elif destination == structure.student_ranks[structure.last]:
            used.add((source, destination, Lane.TARGET))
    return used
