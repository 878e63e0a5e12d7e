"""Proves a schedule before anything runs."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from pipestill.errors import ScheduleError
from pipestill.schedule.action import Action, Kind, Lane, Op, Role
from pipestill.schedule.blockwise.structure import BlockwiseStructure
from pipestill.schedule.needs import lane, meets, needs
from pipestill.schedule.schedule import PipelineStructure, Schedule, Structure

_READS_WEIGHTS = (Op.FORWARD, Op.BACKWARD, Op.INPUT, Op.WEIGHT)


@dataclass(frozen=True, slots=True)
class Versions:
    """Which weight versions (updates applied) the forwards of a step read, over all stages."""

    step: int
    student: tuple[int, ...]
    teacher: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Proof:
    """What the checker established about a schedule; `problems` is empty when it is valid."""

    problems: tuple[str, ...]
    versions: tuple[Versions, ...]
    stash_peak: tuple[int, ...]
    run_ahead: int
    staleness: int
    """Newest version minus the version used, in steps: of the student, and of a teacher that moves."""


def check(schedule: Schedule, num_steps: int = 3) -> Proof:
    """Prove `schedule`, or raise `ScheduleError` with every problem found.

    Proved for runs of any length: every unit of work and every transfer once, on its rank; no deadlock, whether sends
    are buffered or block until their receive is posted. Proved over a warm-up, `num_steps` steps and a cool-down, which
    hold every order that rows can produce: transfers in the same order at both ends of each lane; every stage
    takes the microbatches in order; weight versions; stash and run-ahead bounds.
    """
    proof = examine(schedule, num_steps)
    if proof.problems:
        raise ScheduleError(schedule.strategy, proof.problems)
    return proof


def examine(schedule: Schedule, num_steps: int = 3) -> Proof:
    """Like `check`, but returns the problems instead of raising."""
    problems = [*_work_problems(schedule), *_transfer_problems(schedule)]
    complete = not problems
    rows = schedule.unroll(num_steps + schedule.lookahead)
    problems += _lane_problems(rows, schedule.structure)
    problems += _order_problems(rows)
    if isinstance(schedule.structure, BlockwiseStructure):
        problems += _collective_problems(rows, schedule.structure)
    if complete and not never_stuck(schedule):
        problems += _stuck_ranks(schedule)
    if isinstance(schedule.structure, BlockwiseStructure):
        return _proof_of_blocks(problems, num_steps, schedule)
    versions, version_problems = _versions(rows, schedule.structure)
    problems += version_problems
    stash, run_ahead, bound_problems = _bounds(rows, schedule)
    moving = [v.student + (v.teacher if schedule.pipeline.momentum else ()) for v in versions]
    staleness = max((v.step - used for v, read in zip(versions, moving, strict=True) for used in read), default=0)
    return Proof(tuple(problems + bound_problems), versions[:num_steps], stash, run_ahead, staleness)


def _work_problems(schedule: Schedule) -> list[str]:
    """Every unit of work of one step stands once in the period, on the rank that holds its stage."""
    structure = schedule.structure
    expected = {action: structure.rank_of(action) for action in structure.actions()}
    found = Counter[tuple[Action, int]]()
    problems = []
    for rank, row in enumerate(schedule.rows):
        for action in row:
            if not action.computes:
                continue
            if action.at(0) not in expected:
                problems.append(f"rank {rank}: {action} is not part of the step")
            elif expected[action.at(0)] != rank:
                problems.append(f"rank {rank}: {action} belongs on rank {expected[action.at(0)]}")
            found[action.at(0), rank] += 1
    for action, rank in expected.items():
        times = found[action, rank]
        if times != 1:
            problems.append(f"rank {rank}: {action} stands {times} times in the period, expected once")
    return problems


def _transfer_problems(schedule: Schedule) -> list[str]:
    """Every need that crosses ranks has one send and one receive; there are no others.

    The data is read in the period before its step or earlier, since a period starts by asking for its batch; and its
    sends and receives are of the same step everywhere, so that nothing is on its way when a run ends.
    """
    structure = schedule.structure
    reads = [(rank, action) for rank, row in enumerate(schedule.rows) for action in row if action.op is Op.DATA]
    furthest = max([1, *(action.step for _, action in reads)])
    problems = [
        f"rank {rank}: {action} is of step {action.step}, expected step {furthest} of the data on every rank"
        for rank, action in reads
        if action.step != furthest
    ]
    expected = Counter[tuple[int, Action]]()
    for payload, source, destination in crossings(structure):
        expected[source, payload.send_to(destination)] = 1
        expected[destination, payload.receive_from(source)] = 1
    found = Counter(
        (rank, action.at(0)) for rank, row in enumerate(schedule.rows) for action in row if not action.computes
    )
    return problems + [
        f"rank {rank}: {action} stands {found[rank, action]} times in the period, expected {expected[rank, action]}"
        for rank, action in sorted(expected | found, key=lambda item: (item[0], str(item[1])))
        if found[rank, action] != expected[rank, action]
    ]


def crossings(structure: Structure) -> list[tuple[Action, int, int]]:
    """(work, its rank, a rank that needs its result), once each, in the order of a plain loop's consumers."""
    seen: dict[tuple[Action, int, int], None] = {}
    for consumer in structure.actions():
        destination = structure.rank_of(consumer)
        for need in [] if meets(consumer) else needs(consumer, structure):
            source = structure.rank_of(need)
            if source != destination:
                seen[need.at(0), source, destination] = None
    return list(seen)


def _lane_problems(rows: list[list[Action]], structure: Structure) -> list[str]:
    """On each lane, sends and receives stand in the same order."""
    sent = defaultdict[tuple[int, int, Lane], list[Action]](list)
    received = defaultdict[tuple[int, int, Lane], list[Action]](list)
    for rank, row in enumerate(rows):
        for action in row:
            if action.kind is Kind.SEND and action.peer is not None:
                sent[rank, action.peer, lane(action, action.peer, structure)].append(action.payload)
            elif action.kind is Kind.RECEIVE and action.peer is not None:
                received[action.peer, rank, lane(action, rank, structure)].append(action.payload)
    problems = []
    for (source, destination, name), payloads in sent.items():
        for out, came in zip(payloads, received[source, destination, name], strict=False):
            if out != came:
                problems.append(
                    f"rank {destination}: {name.value} lane from rank {source} is out of order: "
                    f"receives {came} where {out} is sent"
                )
                break
    return problems


def _collective_problems(rows: list[list[Action]], structure: BlockwiseStructure) -> list[str]:
    """Ranks that add up gradients together do so in the same order: a process group tells its collectives by their order."""
    met = defaultdict[tuple[Op, tuple[int, ...]], dict[int, list[Action]]](lambda: defaultdict(list))
    known = set(structure.actions())
    for rank, row in enumerate(rows):
        for action in row:
            if action.op in (Op.BACKWARD, Op.REDUCE) and action.at(0) in known:  # sent on their way, and waited for
                group = tuple(map(structure.rank_of, structure.sharers(action)))
                met[action.op, group][rank].append(action)
    problems = []
    for (_, group), orders in met.items():
        first = orders[group[0]]
        for rank in group[1:]:
            for here, there in zip(orders[rank], first, strict=False):
                if here not in structure.sharers(there):
                    problems.append(
                        f"rank {rank}: {here} is out of order: rank {group[0]} of its group has {there} then"
                    )
                    break
    return problems


def _order_problems(rows: list[list[Action]]) -> list[str]:
    """A stage takes microbatches in the order of a plain loop: so statistics move, and losses and gradients add up."""
    problems = []
    for rank, row in enumerate(rows):
        last = dict[tuple[Role, int, Op], Action]()
        named = set[Action]()  # once, not in every step
        for action in row:
            if action.computes and action.op.per_microbatch:
                before = last.get((action.role, action.stage, action.op))
                if before is not None and _sequence(before) > _sequence(action) and action.at(0) not in named:
                    named.add(action.at(0))
                    problems.append(f"rank {rank}: {action} runs after {before}; a stage takes microbatches in order")
                last[action.role, action.stage, action.op] = action
    return problems


def _sequence(action: Action) -> tuple[int, int]:
    return action.step, -1 if action.microbatch is None else action.microbatch


def never_stuck(schedule: Schedule) -> bool:
    """Whether a run of any length ends, even when sends block until their receive is posted.

    Rows repeat, so what comes before what is a graph of one period: an edge from u to v over w periods says that v
    of period p comes after u of period p - w. An action waits, by way of others, for itself if and only if the edges
    of some cycle add up to 0 periods or fewer. If none do, a period long enough gives every action a fixed time in it,
    later than all that comes before: the search below raises these times until they fit.
    """
    edges = _edges(schedule)
    same_period = {v: [u for u, w in before if w == 0] for v, before in enumerate(edges)}
    try:
        order = list(TopologicalSorter(same_period).static_order())
        period = len(edges) + 1
        time, latest = [0] * len(edges), dict[int, int]()
        moved = True
        while moved:
            moved = False
            for v in order:
                for u, w in edges[v]:
                    if time[u] + 1 - period * w > time[v]:
                        time[v], latest[v], moved = time[u] + 1 - period * w, u, True
            TopologicalSorter({v: (u,) for v, u in latest.items()}).prepare()
    except CycleError:
        return False
    return True


def _edges(schedule: Schedule) -> list[list[tuple[int, int]]]:
    """For each action of the period, numbered rank by rank: those that come before it, and over how many periods."""
    structure = schedule.structure
    place: dict[tuple[int, Action], tuple[int, int]] = {}  # rank, action -> number, written step
    for rank, row in enumerate(schedule.rows):
        for action in row:
            place[rank, action.at(0)] = len(place), action.step
    edges: list[list[tuple[int, int]]] = []
    for rank, row in enumerate(schedule.rows):
        first = len(edges)
        for i, action in enumerate(row):
            before = [(len(edges) - 1, 0) if i else (first + len(row) - 1, 1)]
            sources = list[tuple[int, Action, int]]()  # rank, action, step
            for need in needs(action, structure):
                sources.append((rank, need.at(0), need.step))
                source = structure.rank_of(need)
                if source != rank and meets(action):
                    sources[-1] = (source, need.at(0), need.step)
                elif source != rank:
                    sources[-1:] = [
                        (rank, need.receive_from(source).at(0), need.step),
                        (source, need.send_to(rank).at(0), need.step),
                    ]
            if action.kind is Kind.SEND and action.peer is not None:
                sources.append((action.peer, action.payload.receive_from(rank).at(0), action.step))
            for source, wanted, step in sources:
                if (source, wanted) in place:
                    number, written = place[source, wanted]
                    before.append((number, written - step))
            edges.append(before)
    return edges


def _stuck_ranks(schedule: Schedule) -> list[str]:
    """What the ranks of a schedule that gets stuck wait for, in the shortest run that shows it.

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
    """One line a stuck rank when the rows cannot all run to their end, else nothing.

    A receive only posts a buffer and never blocks on the message itself; work blocks until its inputs are
    there. A send is buffered, or with `rendezvous` blocks until its receive is posted.
    """
    done: list[set[Action]] = [set() for _ in rows]
    posted = set[tuple[int, Action]]()
    sent = set[tuple[int, Action]]()
    position = [0] * len(rows)

    def available(need: Action, rank: int, collective: bool) -> bool:
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


def _proof_of_blocks(problems: list[str], num_steps: int, schedule: Schedule) -> Proof:
    """A student's step waits for the update before it, wherever that was, so no order that can run reads another version."""
    window = schedule.structure.num_microbatches
    steps = [Versions(k, tuple(range(k * window, (k + 1) * window)), (0,)) for k in range(num_steps)]
    return Proof(tuple(problems), tuple(steps), (0,) * len(schedule.rows), schedule.lookahead, 0)


def _versions(rows: list[list[Action]], structure: PipelineStructure) -> tuple[tuple[Versions, ...], list[str]]:
    """The versions that each step's forwards read, and where they are not what the structure declares.

    Step k reads student version k, and a teacher version of 0 when it is frozen, of k when it moves; less the declared
    staleness. A backward runs on the version its forward read. A stage keeps as many old versions of the student's
    weights as its declared staleness, and the teacher's newest only.
    """
    student: dict[int, set[int]] = defaultdict(set)
    teacher: dict[int, set[int]] = defaultdict(set)
    problems = []
    for rank, row in enumerate(rows):
        updates = Counter[tuple[Role, int]]()
        named = set[Action]()  # once, not in every step
        for action in row:
            if not action.computes or action.op not in _READS_WEIGHTS:
                if action.op in (Op.UPDATE, Op.EMA):
                    updates[action.role, action.stage] += 1
                trained = updates[Role.STUDENT, action.stage]
                if action.op is Op.EMA and trained != action.step + 1 and action.at(0) not in named:
                    named.add(action.at(0))
                    problems.append(f"rank {rank}: {action} follows student version {trained}, not {action.step + 1}")
                continue
            newest = updates[action.role, action.stage]
            if action.role is Role.TEACHER:
                expected = max(0, action.step - structure.staleness) if structure.momentum else 0
                used, versions = newest, teacher
            elif structure.train:
                expected = max(0, action.step - structure.student_staleness)
                used, versions = sorted((newest - structure.student_staleness, expected, newest))[1], student
            else:
                continue
            versions[action.step].add(used)
            if used != expected and action.at(0) not in named:
                named.add(action.at(0))
                who = action.role.name.lower()
                problems.append(f"rank {rank}: {action} reads {who} version {used}, expected version {expected}")
    steps = sorted(student)
    return tuple(Versions(k, tuple(sorted(student[k])), tuple(sorted(teacher[k]))) for k in steps), problems


def _bounds(rows: list[list[Action]], schedule: Schedule) -> tuple[tuple[int, ...], int, list[str]]:
    """Stash peak of every rank and the largest run-ahead, and where they pass the declared bounds."""
    structure = schedule.pipeline
    peaks, most_ahead, problems = [], 0, []
    for rank, row in enumerate(rows):
        held = peak = 0
        student, teacher = structure.stages_of(rank, Role.STUDENT), structure.stages_of(rank, Role.TEACHER)
        ahead = 0
        for action in row:
            if not action.computes:
                continue
            if action.op is Op.FORWARD and action.role is Role.STUDENT and structure.train:
                held += 1
            elif action.op is structure.backward_ops[-1]:
                held -= 1
            if action.op is Op.FORWARD and student and teacher:
                taught = len(student) * structure.views
                ahead += taught if action.role is Role.TEACHER else -len(teacher) * structure.teacher_views
                most_ahead = max(most_ahead, -(-ahead // (taught * len(teacher))))
            if held > peak:
                peak = held
                if held > schedule.stash[rank]:
                    problems.append(
                        f"rank {rank}: {action} makes {held} stashed microbatches, the bound is {schedule.stash[rank]}"
                    )
            if most_ahead > schedule.run_ahead and action.role is Role.TEACHER:
                problems.append(
                    f"rank {rank}: {action} runs {most_ahead} microbatches ahead, the bound is {schedule.run_ahead}"
                )
                break
        peaks.append(peak)
    return tuple(peaks), most_ahead, problems
