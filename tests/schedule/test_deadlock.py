"""Ranks that wait for each other for ever are found, whatever the length of a run."""

import pytest
from hypothesis import given, settings, strategies as st
from schedule.tasks import assert_refused, rows_of, with_row

from pipestill.costs import StageCosts
from pipestill.schedule import Action, Kind, Op, PipelineStructure, Role, Schedule, check
from pipestill.schedule.check import examine
from pipestill.schedule.comms import connect
from pipestill.schedule.deadlock import deadlock, never_stuck
from pipestill.schedule.simulate import simulate


def by_hand(*rows: str, teacher_ranks: tuple[int, ...] = (1, 0)) -> Schedule:
    """Two student stages and a teacher that runs the other way round, one microbatch."""
    structure = PipelineStructure((0, 1), teacher_ranks, 1)
    return Schedule("by hand", structure, rows_of(*rows), (1, 1), run_ahead=1)


def test_both_ranks_post_before_they_send() -> None:
    check(
        by_hand(
            "S0D@1 S0D@1>1 T0F0@0<1 S0F0@0 S0F0@0>1 T1F0@0 T1F0@0>1 S1B0@0<1 S0B0@0 S0U@0",
            "S0D@1<0 S0F0@0<0 T0F0@0 T0F0@0>0 T1F0@0<0 S1F0@0 S1L0@0 S1B0@0 S1B0@0>0 S1U@0",
        )
    )


def test_both_ranks_send_before_they_post() -> None:
    """Buffered sends would hide it."""
    schedule = by_hand(
        "S0D@1 S0D@1>1 S0F0@0 S0F0@0>1 T0F0@0<1 T1F0@0 T1F0@0>1 S1B0@0<1 S0B0@0 S0U@0",
        "S0D@1<0 T0F0@0 T0F0@0>0 S0F0@0<0 T1F0@0<0 S1F0@0 S1L0@0 S1B0@0 S1B0@0>0 S1U@0",
    )
    assert examine(schedule).problems == (
        "rank 0: S0F0@0>1 waits for S0F0@0<0 for ever (deadlock with rendezvous sends)",
        "rank 1: T0F0@0>0 waits for T0F0@0<1 for ever (deadlock with rendezvous sends)",
    )
    assert deadlock(schedule.unroll(5), schedule.structure, rendezvous=False) == []


def test_both_ranks_wait_for_each_other() -> None:
    schedule = by_hand(
        "S0D@1 S0D@1>1 T0F0@0<1 T1F0@0 T1F0@0>1 S0F0@0 S0F0@0>1 S1B0@0<1 S0B0@0 S0U@0",
        "S0D@1<0 S0F0@0<0 T1F0@0<0 S1F0@0 T0F0@0 T0F0@0>0 S1L0@0 S1B0@0 S1B0@0>0 S1U@0",
    )
    assert examine(schedule).problems == (
        "rank 0: T1F0@0 waits for T0F0@0 for ever (deadlock with buffered sends)",
        "rank 1: S1F0@0 waits for S0F0@0 for ever (deadlock with buffered sends)",
        "rank 0: T1F0@0 waits for T0F0@0 for ever (deadlock with rendezvous sends)",
        "rank 1: S1F0@0 waits for S0F0@0 for ever (deadlock with rendezvous sends)",
    )
    with pytest.raises(RuntimeError, match=r"rank 0 never runs T1F0@0: the schedule deadlocks"):
        simulate(schedule, StageCosts((1.0, 1.0), (1.0, 1.0), (0.0, 0.0), (1.0, 1.0)))


def test_receive_before_the_data_that_sizes_it() -> None:
    schedule = by_hand(
        "S0D@1 S0D@1>1 T0F0@0<1 S0F0@0 S0F0@0>1 T1F0@0 T1F0@0>1 S1B0@0<1 S0B0@0 S0U@0",
        "S0F0@1<0 S0D@1<0 T0F0@0 T0F0@0>0 T1F0@0<0 S1F0@0 S1L0@0 S1B0@0 S1B0@0>0 S1U@0",
    )
    assert_refused(schedule, 1, Action.parse("S0F0@0<0"))


@st.composite
def shuffled(draw: st.DrawFn) -> Schedule:
    """Complete schedules in orders that nobody would write, most of which get stuck, some only after several steps."""
    num_ranks = draw(st.integers(1, 4))
    rank = st.integers(0, num_ranks - 1)
    students = draw(st.lists(rank, min_size=1, max_size=3))
    teachers = draw(st.lists(rank, max_size=3))
    gaps = {r: i for i, r in enumerate(sorted({*students, *teachers}))}
    structure = PipelineStructure(
        tuple(gaps[r] for r in students),
        tuple(gaps[r] for r in teachers),
        draw(st.integers(1, 2)),
        serial=draw(st.booleans()),
        train=draw(st.booleans()),
        views=draw(st.integers(1, 2)),
        batch_loss=draw(st.booleans()),
        split=draw(st.booleans()),
        clip=draw(st.booleans()),
    )
    rows: list[list[Action]] = [[] for _ in gaps]
    rng = draw(st.randoms(use_true_random=False))
    for r, row in enumerate(rows):
        ahead = {role: rng.randrange(3) for role in Role}
        mine = [a.at(ahead[a.role]) for a in structure.actions() if a.op is not Op.DATA and structure.rank_of(a) == r]
        lines = [[a for a in mine if a.role is role] for role in Role]
        while any(lines):  # each role in its own order, one amid the other
            row.append(rng.choice([line for line in lines if line]).pop(0))
    schedule = connect("shuffled", structure, rows, (99,) * len(rows), run_ahead=99)
    for r in range(len(rows)):
        if rng.random() < 0.3:  # later posts get stuck on rendezvous sends alone
            row = list(schedule.rows[r])
            i = rng.randrange(len(row))
            if row[i].kind is Kind.RECEIVE and row[i].op is not Op.DATA:
                row.insert(min(len(row), i + rng.randrange(4)), row.pop(i))
                schedule = with_row(schedule, r, tuple(row))
    return schedule


@given(shuffled())
@settings(max_examples=30, deadline=None)
def test_never_stuck_says_what_a_long_run_would_show(schedule: Schedule) -> None:
    long = 3 + 2 * schedule.structure.num_ranks * (schedule.lookahead + 1)
    stuck = deadlock(schedule.unroll(long), schedule.structure, rendezvous=True)
    assert never_stuck(schedule) == (not stuck)
    if not never_stuck(schedule):
        assert any("for ever" in p or "out of order" in p or "in order" in p for p in examine(schedule).problems)
