"""Simulates a schedule under costs: a trace of when every action would start and end."""

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from pipestill.costs import Link
from pipestill.schedule.action import Action, Kind, Lane
from pipestill.schedule.schedule import Schedule
from pipestill.schedule.structure import Structure, lane, meets, needs
from pipestill.schedule.trace import Event, Trace

_Result = tuple[int, int]
"""The result of one piece of work: the number of the work, and its step."""


class SimulationCosts(Protocol):
    """What every kind of costs says. The rest is between them and their structure, which knows what its work takes."""

    @property
    def link(self) -> Link:
        """The link between any two ranks."""

    @property
    def interference(self) -> float:
        """How many times as long work takes while every rank computes as while one does alone."""


def simulate(schedule: Schedule[Structure], costs: SimulationCosts, num_steps: int | None = None) -> Trace:
    """Run `schedule` against the clock of `costs` for `num_steps` steps (default: enough for a steady state).

    Each rank does its row in order, as an executor does; a transfer overlaps with work and waits for earlier
    ones on the same edge; a rank that had to wait takes `costs.link.wake_seconds` to go on, and each message keeps its
    sender, and its receiver before the work that uses it, for `costs.link.handling_seconds` and what goes with it. Where
    ranks disturb each other (`costs.interference`), an action's pace follows from how many ranks compute at that moment.
    `costs` are of the structure's kind: `StageCosts` for a pipeline, `BlockwiseCosts` for blockwise training.
    Raises `RuntimeError` on a deadlock; `check` first.
    """
    if num_steps is None:
        num_steps = 9 + 3 * schedule.lookahead
    return _Simulation(schedule, costs, num_steps).run()


def message_seconds(action: Action, destination: int, structure: Structure, costs: SimulationCosts) -> float:
    """Seconds until the result of `action` arrives at rank `destination`; a token takes the link's latency."""
    if lane(action, destination, structure) is Lane.TOKEN:
        return costs.link.latency_seconds
    return structure.transfer_seconds(action, destination, costs)


@dataclass(frozen=True, slots=True)
class _Item:
    """Work or a send of the period, with everything about it that is asked for over and over."""

    action: Action
    number: int
    """The number of the work that is done or sent."""
    seconds: float
    """How long the work computes, or how long a send keeps its rank from working."""
    receiving_seconds: float
    """How long messages that are used here first keep the rank from this work."""
    transfer_seconds: float
    """How long a send's bytes are under way, without latency and the copies at both ends."""
    needed: tuple[_Result, ...]
    """The results that it waits for; their steps are counted from the period's own."""


@dataclass(slots=True)
class _Running:
    """The action that a rank is doing."""

    item: _Item
    period: int
    start: float
    """When the work itself starts, which is after messages for it are received."""
    seconds_left: float
    """At the pace of a rank that works alone."""


def _first_uses(row: Sequence[Action], structure: Structure) -> dict[Action, int]:
    """The position in a row at which each result of another rank is used first: of uses in several periods, the earliest."""
    uses = dict[Action, tuple[int, int]]()
    received = {action.payload.at(0) for action in row if action.kind is Kind.RECEIVE}
    for position, action in enumerate(row):
        for need in needs(action, structure) if action.computes else ():
            result, use = need.at(0), (-need.step, position)
            if result in received:
                uses[result] = min(use, uses.get(result, use))
    return {result: position for result, (_, position) in uses.items()}


class _Simulation:
    """The state of one run: a clock, what each rank is doing, and which results are where."""

    def __init__(self, schedule: Schedule[Structure], costs: SimulationCosts, num_steps: int) -> None:
        self.structure = schedule.structure
        self.costs = costs
        self.num_ranks = len(schedule.rows)
        self.now = 0.0
        numbers = defaultdict[Action, int](count().__next__)
        self.rows = [self._unrolled(row, numbers, schedule.lookahead, num_steps) for row in schedule.rows]
        self.position = [0] * self.num_ranks
        self.results: list[set[_Result]] = [set() for _ in self.rows]  # that each rank has
        self.edge_free_at = defaultdict[tuple[int, int], float](float)
        self.arrivals: list[tuple[float, int, int, _Result]] = []  # a heap of (time, tie-break, rank, result)
        self.tie_break = count()
        self.running: dict[int, _Running] = {}  # by rank
        self.collective_ranks = defaultdict[int, list[int]](list)
        """By work: other ranks that get its result at once."""
        for consumer in filter(meets, self.structure.actions()):
            for need in needs(consumer, self.structure):
                if self.structure.rank_of(need) != self.structure.rank_of(consumer):
                    self.collective_ranks[numbers[need.at(0)]].append(self.structure.rank_of(consumer))
        self.asleep = set[int]()  # ranks that have waited since their last work
        self.events: list[Event] = []

    def _unrolled(
        self, row: Sequence[Action], numbers: dict[Action, int], lookahead: int, num_steps: int
    ) -> list[tuple[_Item, int]]:
        """A rank's work and sends of all steps, each with its period. Receives take no time of their own."""
        first_uses = _first_uses(row, self.structure)
        items = [
            self._item(action, numbers, [result for result, use in first_uses.items() if use == position])
            for position, action in enumerate(row)
            if action.kind is not Kind.RECEIVE
        ]
        periods = range(-lookahead, num_steps)
        return [(item, p) for p in periods for item in items if 0 <= p + item.action.step < num_steps]

    def _item(self, action: Action, numbers: dict[Action, int], used_first: list[Action]) -> _Item:
        """Look up everything about an action. `used_first`: the results of other ranks that no action uses before it."""
        seconds = receiving = transfer = 0.0
        if action.peer is not None:
            seconds, transfer = self._handling(action, action.peer)
        else:
            seconds = self.structure.work_seconds(action, self.costs)
            rank = self.structure.rank_of(action)
            receiving = sum(self._handling(result, rank)[0] for result in used_first)
        needed = tuple((numbers[need.at(0)], need.step) for need in needs(action, self.structure))
        return _Item(action, numbers[action.payload.at(0)], seconds, receiving, transfer, needed)

    def _handling(self, action: Action, destination: int) -> tuple[float, float]:
        """(seconds that the message with the result of `action` keeps either end from its work, seconds between the ends)."""
        link = self.costs.link
        transfer = message_seconds(action, destination, self.structure, self.costs) - link.latency_seconds
        copied = 0.0
        if transfer > 0 and link.handling_bytes_per_second != float("inf"):
            copied = transfer * link.bytes_per_second / link.handling_bytes_per_second
        return link.handling_seconds + copied, max(0.0, transfer - 2 * copied)

    def run(self) -> Trace:
        """Do everything, and return when each piece of work started and ended."""
        may_go_on = set(range(self.num_ranks))
        while True:
            for rank in sorted(may_go_on):
                self._advance(rank)
            if not self.running and not self.arrivals:
                break
            may_go_on = self._pass_time()
        for rank, row in enumerate(self.rows):
            if self.position[rank] < len(row):
                item, period = row[self.position[rank]]
                stuck = item.action.at(period + item.action.step)
                raise RuntimeError(f"rank {rank} never runs {stuck}: the schedule deadlocks")
        structure = self.structure
        return Trace(self.num_ranks, tuple(self.events), by_block=structure.by_block, batches_per_step=structure.batches_per_step)

    def _advance(self, rank: int) -> None:
        """Send what is done, and start the next work if all that it needs is there."""
        row, results = self.rows[rank], self.results[rank]
        while rank not in self.running and self.position[rank] < len(row):
            item, period = row[self.position[rank]]
            for number, step in item.needed:
                if period + step >= 0 and (number, period + step) not in results:
                    self.asleep.add(rank)
                    return
            before = item.receiving_seconds
            if item.seconds + before > 0:
                if rank in self.asleep and item.action.peer is None:
                    self.asleep.discard(rank)
                    before += self.costs.link.wake_seconds
                self.running[rank] = _Running(item, period, self.now + before, item.seconds + before)
            else:
                self._finish(rank, item, period, self.now)
            self.position[rank] += 1

    def _finish(self, rank: int, item: _Item, period: int, start: float) -> None:
        """Send what a send carries, or note the event and the result of work that has ended."""
        step = period + item.action.step
        if item.action.peer is not None:
            # The message goes on its edge behind those that are already under way there.
            edge = rank, item.action.peer
            sent = self.edge_free_at[edge] = max(self.now, self.edge_free_at[edge]) + item.transfer_seconds
            arrival = sent + self.costs.link.latency_seconds
            heapq.heappush(self.arrivals, (arrival, next(self.tie_break), item.action.peer, (item.number, step)))
            return
        self.events.append(Event(rank, item.action.at(step), start, self.now))
        self.results[rank].add((item.number, step))
        for other in self.collective_ranks.get(item.number, ()):
            heapq.heappush(self.arrivals, (self.now, next(self.tie_break), other, (item.number, step)))

    def _pass_time(self) -> set[int]:
        """Move the clock to the next end of work or arrival; the ranks that may now go on."""
        # The fraction of the other ranks that work.
        disturbing = max(0, len(self.running) - 1) / max(1, self.num_ranks - 1)
        pace = 1.0 / (1.0 + (self.costs.interference - 1.0) * disturbing)
        until_end = min((running.seconds_left / pace for running in self.running.values()), default=float("inf"))
        until_arrival = self.arrivals[0][0] - self.now if self.arrivals else float("inf")
        passed = max(0.0, min(until_end, until_arrival))
        self.now += passed
        may_go_on = set[int]()
        for rank, running in list(self.running.items()):
            running.seconds_left -= passed * pace
            rounded_to_nothing = running.seconds_left <= 1e-12 * running.item.seconds
            if rounded_to_nothing or (until_end <= until_arrival and running.seconds_left <= 1e-15):
                del self.running[rank]
                self._finish(rank, running.item, running.period, running.start)
                may_go_on.add(rank)
        while self.arrivals and self.arrivals[0][0] <= self.now:
            _, _, rank, result = heapq.heappop(self.arrivals)
            self.results[rank].add(result)
            may_go_on.add(rank)
        return may_go_on
