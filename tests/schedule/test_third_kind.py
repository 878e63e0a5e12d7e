"""A kind of training that the package has never heard of needs no edit in check, simulate, comms, text or draw.

Workers and a server: rank 0 reads the batch and holds the weights; every other rank takes one microbatch through the whole model
and sends its gradients to the server, which updates the weights and sends them back.

    server     U         U         U
    worker 1   B0        B0        B0        (each a forward, loss and backward of its microbatch)
    worker 2   B1        B1        B1
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
from schedule.tasks import swapped, texts_of, with_row

from pipestill import draw
from pipestill.costs import Link
from pipestill.errors import ScheduleError
from pipestill.schedule import KINDS, Action, Kind, Lane, Op, Proof, Role, Schedule, check
from pipestill.schedule.comms import connect, edges
from pipestill.schedule.simulate import simulate
from pipestill.schedule.structure import Versions
from pipestill.schedule.text import Fields, parse_number


@dataclass(frozen=True)
class ServerCosts:
    """Seconds of a microbatch on a worker and of the server's update."""

    microbatch: float
    update: float
    link: Link
    interference: float = 1.0


@dataclass(frozen=True)
class Workers:
    """A server on rank 0 and `num_workers` more ranks."""

    num_workers: int

    line_names: ClassVar[tuple[str, ...]] = ("workers",)
    receives_by_lane: ClassVar[bool] = False
    by_block: ClassVar[bool] = False
    batches_per_step: ClassVar[int] = 1

    @property
    def num_ranks(self) -> int:
        return 1 + self.num_workers

    def actions(self, step: int = 0) -> Iterator[Action]:
        yield Action(Role.STUDENT, 0, Op.DATA, None, step)
        yield from self._gradients(step)
        yield Action(Role.STUDENT, 0, Op.UPDATE, None, step)

    def rank_of(self, action: Action) -> int:
        return 0 if action.microbatch is None else 1 + action.microbatch

    def needs(self, work: Action) -> list[Action]:
        if work.op is Op.UPDATE:
            return self._gradients(work.step)
        read = Action(Role.STUDENT, 0, Op.DATA, None, work.step)
        return [read, Action(Role.STUDENT, 0, Op.UPDATE, None, work.step - 1)]

    def _gradients(self, step: int) -> list[Action]:
        return [Action(Role.STUDENT, 0, Op.BACKWARD, worker, step) for worker in range(self.num_workers)]

    def sharers(self, work: Action) -> list[Action]:
        return []

    def lane(self, transfer: Action, destination: int) -> Lane:
        return Lane.STATE if transfer.op is Op.UPDATE else Lane.GRADIENT

    def batch_lane(self, destination: int) -> Lane | None:
        return Lane.INPUT

    def prove(
        self, rows: Sequence[Sequence[Action]], num_steps: int, lookahead: int, stash: Sequence[int], run_ahead: int
    ) -> Proof:
        early = [
            f"rank {rank}: {action} is stashed, the bound is {stash[rank]}"
            for rank, row in enumerate(rows)
            for action in row
            if action.computes and action.op is Op.BACKWARD and stash[rank] < 1
        ]
        versions = tuple(Versions(k, (k,), ()) for k in range(num_steps))
        return Proof(tuple(early), versions, tuple(min(1, rank) for rank in range(self.num_ranks)), 0, 0)

    def work_seconds(self, work: Action, costs: ServerCosts) -> float:
        return {Op.DATA: 0.0, Op.BACKWARD: costs.microbatch, Op.UPDATE: costs.update}[work.op]

    def transfer_seconds(self, result: Action, destination: int, costs: ServerCosts) -> float:
        return costs.link.seconds(0 if result.op is Op.DATA else 100)

    def lines(self) -> list[str]:
        return [f"workers: {self.num_workers}"]

    @classmethod
    def from_lines(cls, fields: Fields) -> "Workers":
        return cls(parse_number("workers", fields))

    def label(self, action: Action) -> str:
        return f"gradient{action.microbatch}" if action.op is Op.BACKWARD else action.op.name.lower()


def workers_and_server(num_workers: int) -> Schedule[Workers]:
    """What a strategy of this kind would be: the rows, and the pass that adds the transfers."""
    structure = Workers(num_workers)
    rows: list[list[Action]] = [[] for _ in range(structure.num_ranks)]
    for action in structure.actions():
        if action.op is not Op.DATA:
            rows[structure.rank_of(action)].append(action)
    return connect("workers", structure, rows, (0, *[1] * num_workers), 0)


SCHEDULE = workers_and_server(2)
COSTS = ServerCosts(4.0, 1.0, Link(latency_seconds=0.5, bytes_per_second=100.0))


def test_is_connected() -> None:
    assert texts_of(SCHEDULE.rows) == [
        "S0D@2 S0D@2>1 S0D@2>2 S0B0@1<1 S0B1@1<2 S0U@0 S0U@0>1 S0U@0>2",
        "S0D@2<0 S0U@0<0 S0B0@0 S0B0@0>0",
        "S0D@2<0 S0U@0<0 S0B1@0 S0B1@0>0",
    ]
    assert edges(SCHEDULE.structure) == {
        *((0, worker, on) for worker in (1, 2) for on in (Lane.INPUT, Lane.STATE)),
        *((worker, 0, Lane.GRADIENT) for worker in (1, 2)),
    }


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_is_proved(num_workers: int) -> None:
    proof = check(workers_and_server(num_workers))
    assert proof.staleness == 0 and proof.stash_peak == (0, *[1] * num_workers)
    assert proof.versions == (Versions(0, (0,), ()), Versions(1, (1,), ()), Versions(2, (2,), ()))


def test_is_refused_with_all_problems() -> None:
    twice = with_row(SCHEDULE, 0, [*SCHEDULE.rows[0], Action.parse("S0U@0")])
    with pytest.raises(ScheduleError, match="rank 0: S0U@0 stands 2 times in the period, expected once"):
        check(twice)
    alone = with_row(SCHEDULE, 1, [a for a in SCHEDULE.rows[1] if a.kind is not Kind.SEND])
    with pytest.raises(ScheduleError, match="rank 1: S0B0@0>0 stands 0 times in the period, expected 1"):
        check(alone)
    with pytest.raises(ScheduleError, match=r"rank 0: S0U@0>1 waits for S0U@0 for ever"):
        check(swapped(SCHEDULE, 0, 5, 6))
    with pytest.raises(ScheduleError, match="rank 2: S0B1@0 is stashed, the bound is 0"):
        check(replace(SCHEDULE, stash=(0, 1, 0)))


def test_is_simulated() -> None:
    """A step: weights and gradients take 1.5 seconds each way, the microbatch 4 and the update 1."""
    trace = simulate(SCHEDULE, COSTS)
    assert trace.step_seconds() == pytest.approx([8.0] * len(trace.step_seconds()))
    assert trace.utilisation == pytest.approx((1 + 2 * 4) / (3 * 8))
    crowded = simulate(SCHEDULE, replace(COSTS, interference=2.0))
    assert crowded.seconds_per_step == pytest.approx(8.0 + 4 * 0.5)  # two of three ranks work at a time


def test_is_drawn(tmp_path: Path) -> None:
    trace = simulate(SCHEDULE, COSTS)
    assert draw.schedule_table(SCHEDULE) == "rank 0 | update\nrank 1 | gradient0\nrank 2 | gradient1\n"
    transfers = draw.schedule_table(SCHEDULE, transfers=True).splitlines()[1]
    assert " ".join(transfers.split()) == "rank 1 | data@2<0 update<0 gradient0 gradient0>0"
    assert draw.text(trace, width=60).splitlines()[:3] == [
        "rank 0 |.....................U--.....................U--|",
        "rank 1 |....B0----------............B0----------........|",
        "rank 2 |....B1----------............B1----------........|",
    ]
    draw.picture([trace], tmp_path / "a.svg", titles=["workers"])
    svg = (tmp_path / "a.svg").read_text()
    assert "trace0-backward-0" in svg and "<!-- 8 s per step, utilisation 37.5% -->" in svg
    draw.write_chrome_trace(trace, tmp_path / "a.json")
    assert draw.read_chrome_trace(tmp_path / "a.json").seconds_per_step == pytest.approx(8.0)


def test_is_written_and_read_back() -> None:
    text = SCHEDULE.to_text()
    assert text.splitlines()[:3] == ["pipestill schedule 1", "strategy: workers", "workers: 2"]
    assert Schedule.from_text(text, *KINDS, Workers) == SCHEDULE
    assert Schedule.from_text(text, Workers) == SCHEDULE
    with pytest.raises(ValueError, match="lacks the line 'student ranks'"):
        Schedule.from_text(text, *KINDS)  # whoever reads it has to know the kind
