"""The proof that the ranks of a schedule never wait for each other in a circle, and a story for those that do."""

from collections import deque
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

from pipestill.schedule.action import Action, Kind
from pipestill.schedule.schedule import Schedule
from pipestill.schedule.structure import Structure, meets, needs


def never_stuck(schedule: Schedule[Structure]) -> bool:
    """Whether a run of any length ends, even when sends block until their receive is posted.

    Rows repeat, so what comes before what is a graph of one period: an edge from u to v over w periods says that v
    of period p comes after u of period p - w. An action waits, by way of others, for itself if and only if the edges
    of some cycle add up to 0 periods or fewer. If none do, a period long enough gives every action a fixed time in it,
    later than all that comes before: the search below raises these times until they fit.
    """
    edges = _edges(schedule)
    same_period = {v: [u for u, periods in before if periods == 0] for v, before in enumerate(edges)}
    try:
        order = list(TopologicalSorter(same_period).static_order())
        period = len(edges) + 1  # longer than any chain of actions of one period
        time = [0] * len(edges)
        raised_by = dict[int, int]()  # the action that each one's time follows from
        moved = True
        while moved:
            moved = False
            for v in order:
                for u, periods in edges[v]:
                    earliest = time[u] + 1 - period * periods
                    if earliest > time[v]:
                        time[v] = earliest
                        raised_by[v] = u
                        moved = True
            TopologicalSorter({v: (u,) for v, u in raised_by.items()}).prepare()
    except CycleError:
        return False
    return True


def _edges(schedule: Schedule[Structure]) -> list[list[tuple[int, int]]]:
    """For each action of the period, numbered rank by rank: those that come before it, and over how many periods."""
    numbers: dict[tuple[int, Action], tuple[int, int]] = {}  # (rank, action at step 0) -> number, written step
    for rank, row in enumerate(schedule.rows):
        for action in row:
            numbers[rank, action.at(0)] = len(numbers), action.step
    edges: list[list[tuple[int, int]]] = []
    for rank, row in enumerate(schedule.rows):
        first = len(edges)
        for i, action in enumerate(row):
            before = [(first + i - 1, 0) if i else (first + len(row) - 1, 1)]  # the row's own order
            for source, wanted in _waited_for(action, rank, schedule.structure):
                if (source, wanted.at(0)) in numbers:
                    number, written = numbers[source, wanted.at(0)]
                    before.append((number, written - wanted.step))
            edges.append(before)
    return edges


def _waited_for(action: Action, rank: int, structure: Structure) -> Iterator[tuple[int, Action]]:
    """(rank, action) for everything on any rank that an action waits for besides its row, with sends that block."""
    for need in needs(action, structure):
        source = structure.rank_of(need)
        if source == rank or meets(action):
            yield source, need
        else:
            yield rank, need.receive_from(source)
            yield source, need.send_to(rank)
    if action.kind is Kind.SEND and action.peer is not None:
        yield action.peer, action.payload.receive_from(rank)


def stuck_ranks(schedule: Schedule[Structure]) -> list[str]:
    """For each rank of a schedule that gets stuck, what it waits for in the shortest run that shows it.

    Ranks wait for each other within a step, so a cycle reaches over `lookahead` steps a rank at most.
    """
    num_steps, structure = 2, schedule.structure
    while True:
        rows = schedule.unroll(num_steps)
        stuck = [line for rendezvous in (False, True) for line in deadlock(rows, structure, rendezvous=rendezvous)]
        if stuck or num_steps > structure.num_ranks * schedule.lookahead + 2:
            return stuck
        num_steps *= 2


def deadlock(rows: list[list[Action]], structure: Structure, *, rendezvous: bool) -> list[str]:
    """One line for each stuck rank when the rows cannot all run to their end, else nothing.

    A receive only posts a buffer and never blocks on the message itself; work blocks until its inputs are
    there. A send is buffered, or with `rendezvous` blocks until its receive is posted.
    """
    done: list[set[Action]] = [set() for _ in rows]  # work that each rank has done
    posted = set[tuple[int, Action]]()  # (receiver, result)
    sent = set[tuple[int, Action]]()  # (receiver, result)
    position = [0] * len(rows)

    def available(need: Action, rank: int, collective: bool) -> bool:
        """Whether a result is on a rank; a collective takes it where it was made."""
        if collective and need.step >= 0:
            return need in done[structure.rank_of(need)]
        return need.step < 0 or need in done[rank] or ((rank, need) in posted and (rank, need) in sent)

    def awaited(rank: int) -> Action | None:
        """What the rank's next action waits for; None when it can run now."""
        action = rows[rank][position[rank]]
        for need in needs(action, structure):
            if not available(need, rank, meets(action)):
                return need
        if rendezvous and action.kind is Kind.SEND and (action.peer, action.payload) not in posted:
            assert action.peer is not None
            return action.payload.receive_from(rank)
        return None

    todo = deque(range(len(rows)))
    while todo:
        rank = todo.popleft()
        moved = False
        while position[rank] < len(rows[rank]) and awaited(rank) is None:
            action = rows[rank][position[rank]]
            if action.computes:
                done[rank].add(action)
            elif action.kind is Kind.RECEIVE:
                posted.add((rank, action.payload))
            else:
                assert action.peer is not None
                sent.add((action.peer, action.payload))
            position[rank] += 1
            moved = True
        if moved:
            todo.extend(r for r in range(len(rows)) if r != rank and r not in todo)
    kind = "rendezvous" if rendezvous else "buffered"
    return [
        f"rank {rank}: {row[position[rank]]} waits for {awaited(rank)} for ever (deadlock with {kind} sends)"
        for rank, row in enumerate(rows)
        if position[rank] < len(row)
    ]
