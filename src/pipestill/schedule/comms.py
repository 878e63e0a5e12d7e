"""The pass that inserts reads of the data, sends and receives into rows of work.

Rows repeat period after period, so a place in a row is counted as a *moment* of an endless row. Moment 0 is the first action of
the period whose own step is that of the result in question. In rows of 4 actions, with a lead of 1:

    moment                     -4    -3    -2    -1  |   0     1     2     3
    action                   F0@0  B0@0   U@0  t0@1  | F0@0  B0@0   U@0  t0@1
                             -- period before ------ | -- period of the step --

The result that F0@0 needs is used at moment 0, so its receive is posted at moment -1. In the row that is before the action at
position 3 (-1 modulo 4), and one step ahead of the period in which it is posted: a receive of step 1. What t0@1 needs is of the
step after its period's own: seen from that step's period, t0@1 stands at moment -1, and its receive at -2.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipestill.schedule.action import Action, Lane, Op, Role
from pipestill.schedule.deadlock import never_stuck
from pipestill.schedule.schedule import Row, Schedule
from pipestill.schedule.structure import S, Structure, crossings, lane, meets, needs


class _Place(NamedTuple):
    """The place of work in its own rank's row, and how many steps ahead of the period's own it is."""

    position: int
    step: int


def connect(strategy: str, structure: S, rows: Sequence[Sequence[Action]], stash: tuple[int, ...], run_ahead: int) -> Schedule[S]:
    """Make a schedule with data reads, sends and receives from rows of work without transfers.

    A send stands right after its work. A receive posts its buffer `lead` actions before the work that needs
    it; all receives use the smallest power of two that survives sends which block until their receive is posted, so
    that the schedule runs on any transport. The data is read (and every rank told its rows) one step before
    anything of that step is posted or run.
    """
    destinations = defaultdict[Action, list[int]](list)
    for payload, _, destination in crossings(structure):
        destinations[payload].append(destination)
    lead = 1
    longest = max(len(row) for row in rows)
    furthest = 1 + max((action.step for row in rows for action in row), default=0)
    while True:
        complete = _with_data(_with_transfers(rows, structure, destinations, lead), structure, destinations)
        schedule = Schedule(strategy, structure, complete, stash, run_ahead)
        if lead > longest * furthest or never_stuck(schedule):
            return schedule
        lead *= 2


def _with_data(
    rows: Sequence[Sequence[Action]], structure: Structure, destinations: Mapping[Action, list[int]]
) -> tuple[Row, ...]:
    """The rows, each with the read of the data or its arrival at the head."""
    read = Action(Role.STUDENT, 0, Op.DATA, None, 1 + max((a.step for row in rows for a in row), default=0))
    reader = structure.rank_of(read)
    reading = (read, *(read.send_to(to) for to in sorted(destinations.get(read.at(0), ()))))
    return tuple((*(reading if r == reader else (read.receive_from(reader),)), *row) for r, row in enumerate(rows))


def _with_transfers(
    rows: Sequence[Sequence[Action]], structure: Structure, destinations: Mapping[Action, list[int]], lead: int
) -> list[list[Action]]:
    """The rows with sends after their work, and receives `lead` actions before theirs."""
    places = {action.at(0): _Place(index, action.step) for row in rows for index, action in enumerate(row)}
    connected = []
    for rank, row in enumerate(rows):
        moments = _moments_before_use(row, rank, structure, lead)
        if structure.receives_by_lane:
            moments = _by_lane(moments, rank, structure, places, len(row))
        posted = defaultdict[int, list[Action]](list)
        for result, moment in moments.items():
            periods, position = divmod(moment, len(row))
            posted[position].append(result.receive_from(structure.rank_of(result)).at(-periods))
        out = list[Action]()
        for position, action in enumerate(row):
            receives = posted[position]
            if not structure.receives_by_lane:
                # A period's own receives come after those of later periods that wrapped into it: lanes keep their order.
                receives = sorted(receives, key=lambda receive: receive.step)
            out += [*receives, action, *(action.send_to(to) for to in destinations.get(action.at(0), ()))]
        connected.append(out)
    return connected


def _moments_before_use(row: Sequence[Action], rank: int, structure: Structure, lead: int) -> dict[Action, int]:
    """For each result of another rank, the moment `lead` actions before its first use, in its own period at the latest."""
    moments: dict[Action, int] = {}
    for position, consumer in enumerate(row):
        for need in [] if meets(consumer) else needs(consumer, structure):
            if need.op is not Op.DATA and structure.rank_of(need) != rank:
                use = position - need.step * len(row)
                moment = min(use - lead, len(row) - 1)
                moments[need.at(0)] = min(moment, moments.get(need.at(0), moment))
    return moments


def _by_lane(
    moments: dict[Action, int], rank: int, structure: Structure, places: Mapping[Action, _Place], period: int
) -> dict[Action, int]:
    """The moments, lane by lane, made earlier where a lane would else bring its results in another order than they are posted.

    That is needed where one period sends results of several steps on a lane.
    """
    lanes = defaultdict[tuple[int, Lane], list[Action]](list)
    for result in sorted(moments, key=places.__getitem__):
        source = structure.rank_of(result)
        lanes[source, lane(result.receive_from(source), rank, structure)].append(result)
    return {result: moment for sent in lanes.values() for result, moment in _in_turn(sent, moments, places, period).items()}


def _in_turn(sent: list[Action], moments: dict[Action, int], places: Mapping[Action, _Place], period: int) -> dict[Action, int]:
    """Moments that are no later than the given ones, and in the order in which one period after the other sends `sent`.

    Counted from the period that sends it, a result of s steps ahead has its moment s periods later. On that scale a result
    is posted no later than the one sent after it, and the last of a period before the first of the next.
    """
    later = {result: places[result].step * period for result in sent}
    turns = dict[Action, int]()
    latest = moments[sent[-1]] + later[sent[-1]]
    for result in reversed(sent):
        latest = turns[result] = min(latest, moments[result] + later[result])
    first_of_next_period = turns[sent[0]] + period
    return {result: min(turns[result], first_of_next_period - 1) - later[result] for result in sent}


def edges(structure: Structure) -> set[tuple[int, int, Lane]]:
    """Every directed edge and lane on which tensors of a model or of the batch travel: (source, destination, lane)."""
    used = set[tuple[int, int, Lane]]()
    for payload, source, destination in crossings(structure):
        on: Lane | None = lane(payload.receive_from(source), destination, structure)
        if on is Lane.DATA:  # row counts; the batch's tensors follow on a lane of their own
            on = structure.batch_lane(destination)
        if on is not None:
            used.add((source, destination, on))
    return used
