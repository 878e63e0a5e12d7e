"""The check that proves a schedule before anything runs.

What is true of every kind of training is proved here and in `deadlock`; the structure itself proves what only its kind knows,
such as weight versions (`pipeline/structure.py`).
"""

from collections import Counter, defaultdict
from dataclasses import replace

from pipestill.errors import ScheduleError
from pipestill.schedule.action import Action, Kind, Lane, Op, Role
from pipestill.schedule.deadlock import never_stuck, stuck_ranks
from pipestill.schedule.schedule import Schedule
from pipestill.schedule.structure import Proof, Structure, crossings, lane, meets


def check(schedule: Schedule[Structure], num_steps: int = 3) -> Proof:
    """Prove `schedule`, or raise `ScheduleError` with every problem found.

    Proved for runs of any length: every unit of work and every transfer stands once, on its rank; nothing deadlocks, whether
    sends are buffered or block until their receive is posted. Proved over a warm-up, `num_steps` steps and a cool-down, which
    hold every order that rows can produce: transfers stand in the same order at both ends of each lane; every stage
    takes the microbatches in order; ranks that share a batch meet in the same order; weight versions are those declared, and
    so are the bounds on stash and run-ahead.
    """
    proof = examine(schedule, num_steps)
    if proof.problems:
        raise ScheduleError(schedule.strategy, proof.problems)
    return proof


def examine(schedule: Schedule[Structure], num_steps: int = 3) -> Proof:
    """Like `check`, but return the problems instead of raising."""
    problems = [*_work_problems(schedule), *_transfer_problems(schedule)]
    complete = not problems
    rows = schedule.unroll(num_steps + schedule.lookahead)
    problems += _lane_problems(rows, schedule.structure)
    problems += _order_problems(rows)
    problems += _collective_problems(rows, schedule.structure)
    if complete and not never_stuck(schedule):
        problems += stuck_ranks(schedule)
    proof = schedule.structure.prove(rows, num_steps, schedule.lookahead, schedule.stash, schedule.run_ahead)
    return replace(proof, problems=(*problems, *proof.problems))


def _work_problems(schedule: Schedule[Structure]) -> list[str]:
    """Find work of a step that does not stand once in the period, on the rank that computes it."""
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


def _transfer_problems(schedule: Schedule[Structure]) -> list[str]:
    """Find needs that cross ranks without one send and one receive, and transfers that meet no need.

    The data is to be read in the period before its step or earlier, since a period starts by asking for its batch; and its
    sends and receives are to be of the same step everywhere, so that nothing is on its way when a run ends.
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
    found = Counter((rank, action.at(0)) for rank, row in enumerate(schedule.rows) for action in row if not action.computes)
    return problems + [
        f"rank {rank}: {action} stands {found[rank, action]} times in the period, expected {expected[rank, action]}"
        for rank, action in sorted(expected | found, key=lambda item: (item[0], str(item[1])))
        if found[rank, action] != expected[rank, action]
    ]


def _lane_problems(rows: list[list[Action]], structure: Structure) -> list[str]:
    """Find lanes whose sends and receives do not stand in the same order."""
    orders = defaultdict[tuple[int, int, Lane], dict[Kind, list[Action]]](lambda: defaultdict(list))
    for rank, row in enumerate(rows):
        for action in row:
            if action.peer is not None:
                source, destination = (rank, action.peer) if action.kind is Kind.SEND else (action.peer, rank)
                orders[source, destination, lane(action, destination, structure)][action.kind].append(action.payload)
    problems = []
    for (source, destination, name), payloads in orders.items():
        for out, came in zip(payloads[Kind.SEND], payloads[Kind.RECEIVE], strict=False):
            if out != came:
                problems.append(
                    f"rank {destination}: {name.value} lane from rank {source} is out of order: "
                    f"receives {came} where {out} is sent"
                )
                break
    return problems


def _collective_problems(rows: list[list[Action]], structure: Structure) -> list[str]:
    """Find ranks that add up gradients together in different orders: a process group matches collectives by order."""
    if not any(map(meets, structure.actions())):
        return []
    met = defaultdict[tuple[Op, tuple[int, ...]], dict[int, list[Action]]](lambda: defaultdict(list))
    known = set(structure.actions())
    for rank, row in enumerate(rows):
        for action in row:
            if action.op in (Op.BACKWARD, Op.REDUCE) and action.at(0) in known:  # which start a sum, and wait for it
                group = tuple(map(structure.rank_of, structure.sharers(action)))
                met[action.op, group][rank].append(action)
    problems = []
    for (_, group), orders in met.items():
        first = orders[group[0]]
        for rank in group[1:]:
            for here, there in zip(orders[rank], first, strict=False):
                if here not in structure.sharers(there):
                    problems.append(f"rank {rank}: {here} is out of order: rank {group[0]} of its group has {there} then")
                    break
    return problems


def _order_problems(rows: list[list[Action]]) -> list[str]:
    """Find stages that take microbatches in another order than a plain loop, in which statistics move and gradients add up."""
    problems = []
    for rank, row in enumerate(rows):
        last = dict[tuple[Role, int, Op], tuple[int, int, Action]]()
        named = set[Action]()  # once, not in every step
        for action in row:
            if action.computes and action.op.per_microbatch:
                before, place = last.get((action.role, action.stage, action.op)), (action.step, action.microbatch or 0)
                if before is not None and before[:2] > place and action.at(0) not in named:
                    named.add(action.at(0))
                    problems.append(f"rank {rank}: {action} runs after {before[2]}; a stage takes microbatches in order")
                last[action.role, action.stage, action.op] = *place, action
    return problems
