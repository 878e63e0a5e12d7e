"""Schedule + costs -> trace: when every action would start and end."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from pipestill.costs import StageCosts
from pipestill.schedule.action import Action, Kind, Lane, Op, Role
from pipestill.schedule.blockwise.costs import BlockwiseCosts
from pipestill.schedule.blockwise.structure import BlockwiseStructure
from pipestill.schedule.needs import lane, meets, needs
from pipestill.schedule.schedule import PipelineStructure, Schedule, Structure
from pipestill.schedule.trace import Event, Trace

AnyCosts = StageCosts | BlockwiseCosts


def simulate(schedule: Schedule, costs: AnyCosts, num_steps: int | None = None) -> Trace:
    """Run `schedule` against the clock of `costs` for `num_steps` steps (default: enough for a steady state).

    Each rank does its row in order, as an executor does; a transfer overlaps with work and waits for earlier
    ones on the same edge; a rank that had to wait takes `costs.link.wake_seconds` to go on, and each message keeps its
    sender, and its receiver before the work that uses it, for `costs.link.handling_seconds` and what goes with it. Where
    ranks disturb each other (`costs.interference`), an action's pace follows from how many ranks compute at that moment.
    Raises `RuntimeError` on a deadlock; `check` first.
    """
    if num_steps is None:
        num_steps = 9 + 3 * schedule.lookahead
    return _Simulation(schedule, costs, num_steps).run()


def work_seconds(action: Action, structure: Structure, costs: AnyCosts) -> float:
    """How long `action` computes when no other rank disturbs it, in either kind of structure."""
    if isinstance(structure, BlockwiseStructure):
        assert isinstance(costs, BlockwiseCosts)
        return costs.action_seconds(action, structure)
    assert isinstance(costs, StageCosts)
    return action_seconds(action, structure, costs)


def message_seconds(action: Action, destination: int, structure: Structure, costs: AnyCosts) -> float:
    """How long the result of `action` takes to arrive at rank `destination`, in either kind of structure."""
    if lane(action, destination, structure) is Lane.TOKEN:
        return costs.link.latency_seconds
    if isinstance(structure, BlockwiseStructure):
        assert isinstance(costs, BlockwiseCosts)
        return costs.transfer_seconds(action, destination, structure)
    assert isinstance(costs, StageCosts)
    return transfer_seconds(action, structure, costs)


def action_seconds(action: Action, structure: PipelineStructure, costs: StageCosts) -> float:
    """How long `action` computes when no other rank disturbs it."""
    if action.op is Op.DATA:
        return costs.data
    if action.op is Op.LOSS:
        return costs.loss * structure.num_microbatches / structure.num_losses / structure.pieces
    if action.op is Op.UPDATE:
        return costs.update[action.stage]
    if action.op is Op.EMA:
        return costs.ema[action.stage] if costs.ema else 0.0
    if action.op is Op.NORM:
        return 0.0
    weight = costs.weight[action.stage] if costs.weight else 0.0
    if action.op is Op.FORWARD:
        seconds = (costs.forward if action.role is Role.STUDENT else costs.teacher)[action.stage]
    elif action.op is Op.WEIGHT:
        seconds = weight
    else:
        seconds = costs.backward[action.stage] - (weight if action.op is Op.INPUT else 0.0)
    return seconds * unit_scale(action, structure, costs)


def transfer_seconds(action: Action, structure: PipelineStructure, costs: StageCosts) -> float:
    """How long the result of `action` takes to arrive at another rank: a boundary's activations or their gradients."""
    if action.microbatch is None:
        return costs.link.seconds(0)
    if action.op is Op.FORWARD:
        sizes, boundary = costs.activation_bytes if action.role is Role.STUDENT else costs.teacher_bytes, action.stage
    else:
        sizes, boundary = costs.activation_bytes, action.stage - 1
    return costs.link.seconds(sizes[boundary] * unit_scale(action, structure, costs) if sizes else 0)


def unit_scale(action: Action, structure: PipelineStructure, costs: StageCosts) -> float:
    """How much longer a forward or a backward takes than the costs' microbatch in a view that costs 1."""
    assert action.microbatch is not None
    views = structure.views if action.role is Role.STUDENT else structure.teacher_views
    return costs.views[action.microbatch % views] / structure.pieces


@dataclass(frozen=True, slots=True)
class _Todo:
    """One work or send of the period with all that is asked of it over and over: looked up once."""

    action: Action
    payload: int  # results are known by a number and a step
    seconds: float  # of the work, or what a send keeps the rank from it
    taking: float  # what messages that the work uses keep the rank from it
    transfer: float  # of a send, without its latency and the copies at its ends
    needed: tuple[tuple[int, int], ...]  # results, and the step that each is of, counted from the period's own


def _first_uses(row: Sequence[Action], structure: Structure) -> dict[Action, int]:
    """Where in a period each result that a rank receives is used first: of uses in several periods, in the earliest."""
    uses = dict[Action, tuple[int, int]]()
    received = {action.payload.at(0) for action in row if action.kind is Kind.RECEIVE}
    for position, action in enumerate(row):
        for need in needs(action, structure) if action.computes else ():
            result, use = need.at(0), (-need.step, position)
            if result in received:
                uses[result] = min(use, uses.get(result, use))
    return {result: position for result, (_, position) in uses.items()}


class _Simulation:
    """The state of one run: a clock, what each rank is doing, and what is where."""

    def __init__(self, schedule: Schedule, costs: AnyCosts, num_steps: int) -> None:
        self.structure = schedule.structure
        self.costs = costs
        self.num_ranks = len(schedule.rows)
        self.now = 0.0
        numbers = defaultdict[Action, int](count().__next__)
        periods = range(-schedule.lookahead, num_steps)
        self.rows: list[list[tuple[_Todo, int]]] = []
        for row in schedule.rows:
            first = _first_uses(row, self.structure)
            todo = [
                self._look_up(action, numbers, [need for need, place in first.items() if place == position])
                for position, action in enumerate(row)
                if action.kind is not Kind.RECEIVE
            ]
            self.rows.append([(t, p) for p in periods for t in todo if 0 <= p + t.action.step < num_steps])
        self.position = [0] * self.num_ranks
        self.here: list[set[tuple[int, int]]] = [set() for _ in self.rows]
        self.edge_free: dict[tuple[int, int], float] = {}
        self.arrivals: list[tuple[float, int, int, tuple[int, int]]] = []  # time, tie-break, rank, result
        self.ticket = count()
        self.running: dict[int, tuple[_Todo, int, float, float]] = {}  # rank -> work, period, start, work left
        self.met: dict[int, list[int]] = defaultdict(list)  # work -> other ranks that a collective brings its result to
        for consumer in filter(meets, self.structure.actions()):
            for need in needs(consumer, self.structure):
                if self.structure.rank_of(need) != self.structure.rank_of(consumer):
                    self.met[numbers[need.at(0)]].append(self.structure.rank_of(consumer))
        self.slept = set[int]()  # ranks that have waited since their last work
        self.events: list[Event] = []

    def _look_up(self, action: Action, numbers: dict[Action, int], taken: list[Action]) -> _Todo:
        """`taken`: results of other ranks that are used here first."""
        seconds = taking = transfer = 0.0
        if action.peer is not None:
            seconds, transfer = self._handling(action, action.peer)
        else:
            seconds = work_seconds(action, self.structure, self.costs)
            rank = self.structure.rank_of(action)
            taking = sum(self._handling(result, rank)[0] for result in taken)
        needed = tuple((numbers[need.at(0)], need.step) for need in needs(action, self.structure))
        return _Todo(action, numbers[action.payload.at(0)], seconds, taking, transfer, needed)

    def _handling(self, action: Action, destination: int) -> tuple[float, float]:
        """What the message with the result of `action` keeps either end from its work, and how long it is between them."""
        link = self.costs.link
        transfer = message_seconds(action, destination, self.structure, self.costs) - link.latency_seconds
        copied = 0.0
        if transfer > 0 and link.handling_bytes_per_second != float("inf"):
            copied = transfer * link.bytes_per_second / link.handling_bytes_per_second
        return link.handling_seconds + copied, max(0.0, transfer - 2 * copied)

    def run(self) -> Trace:
        waiting = set(range(self.num_ranks))
        while True:
            for rank in sorted(waiting):
                self._advance(rank)
            if not self.running and not self.arrivals:
                break
            waiting = self._pass_time()
        for rank, row in enumerate(self.rows):
            if self.position[rank] < len(row):
                todo, period = row[self.position[rank]]
                stuck = todo.action.at(period + todo.action.step)
                raise RuntimeError(f"rank {rank} never runs {stuck}: the schedule deadlocks")
        if isinstance(self.structure, BlockwiseStructure):
            return Trace(self.num_ranks, tuple(self.events), blockwise=True, window=self.structure.window)
        return Trace(self.num_ranks, tuple(self.events))

    def _advance(self, rank: int) -> None:
        """Send what is done, and start the next work if what it needs is here."""
        row, here = self.rows[rank], self.here[rank]
        while rank not in self.running and self.position[rank] < len(row):
            todo, period = row[self.position[rank]]
            for result, step in todo.needed:
                if period + step >= 0 and (result, period + step) not in here:
                    self.slept.add(rank)
                    return
            if todo.seconds + todo.taking > 0:
                before = todo.taking
                if rank in self.slept and todo.action.peer is None:
                    self.slept.discard(rank)
                    before += self.costs.link.wake_seconds
                self.running[rank] = (todo, period, self.now + before, todo.seconds + before)
            else:
                self._finish(rank, todo, period, self.now)
            self.position[rank] += 1

    def _send(self, rank: int, peer: int, todo: _Todo, period: int) -> None:
        sent = max(self.now, self.edge_free.get((rank, peer), 0.0)) + todo.transfer
        self.edge_free[rank, peer] = sent
        result = (todo.payload, period + todo.action.step)
        heapq.heappush(self.arrivals, (sent + self.costs.link.latency_seconds, next(self.ticket), peer, result))

    def _finish(self, rank: int, todo: _Todo, period: int, start: float) -> None:
        if todo.action.peer is not None:
            if todo.action.kind is Kind.SEND:
                self._send(rank, todo.action.peer, todo, period)
            return
        step = period + todo.action.step
        self.events.append(Event(rank, todo.action.at(step), start, self.now))
        self.here[rank].add((todo.payload, step))
        for other in self.met.get(todo.payload, ()):
            heapq.heappush(self.arrivals, (self.now, next(self.ticket), other, (todo.payload, step)))

    def _pass_time(self) -> set[int]:
        """Move the clock to the next end of work or arrival; the ranks that may now go on."""
        others = max(0, len(self.running) - 1)  # whom each working rank is disturbed by
        crowd = others / max(1, self.num_ranks - 1)
        pace = 1.0 / (1.0 + (self.costs.interference - 1.0) * crowd)
        next_end = min((left / pace for *_, left in self.running.values()), default=float("inf"))
        next_arrival = self.arrivals[0][0] - self.now if self.arrivals else float("inf")
        passed = max(0.0, min(next_end, next_arrival))
        self.now += passed
        changed = set[int]()
        for rank, (todo, period, start, left) in list(self.running.items()):
            left -= passed * pace
            if left <= 1e-12 * todo.seconds or (next_end <= next_arrival and left <= 1e-15):
                del self.running[rank]
                self._finish(rank, todo, period, start)
                changed.add(rank)
            else:
                self.running[rank] = (todo, period, start, left)
        while self.arrivals and self.arrivals[0][0] <= self.now:
            _, _, rank, result = heapq.heappop(self.arrivals)
            self.here[rank].add(result)
            changed.add(rank)
        return changed
