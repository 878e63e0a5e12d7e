"""Schedules of blockwise training: their tables, and what holds for all of them."""

from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st
from schedule.blockwise.tasks import HYBRID, RELAY, block_schedules, costs_of, half_a_block_moves, line
from schedule.tasks import assert_refused, places, rows_of, swapped, with_row, work_of

from pipestill.draw import schedule_table
from pipestill.errors import ScheduleError
from pipestill.schedule import Action, Lane, Op, Schedule, check
from pipestill.schedule.blockwise.generate import AHEAD, Portion, alone, sliced, staged
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.schedule.blockwise.shares import equal_shares
from pipestill.schedule.blockwise.structure import BlockwiseCosts, BlockwiseStructure
from pipestill.schedule.comms import connect, edges
from pipestill.schedule.simulate import message_seconds, simulate
from pipestill.schedule.structure import needs

# ---------------------------------------------------------------- tables


def test_relay() -> None:
    schedule = staged("relay-dpu", RELAY)
    assert schedule_table(schedule) == (
        "rank 0 | T0 B0 U0\n"
        "rank 1 | T1 B1 U1\n"
        "rank 2 | T2 T3 B2 U2 B3 U3\n"
    )  # fmt: skip
    assert schedule.structure.ahead == AHEAD
    assert check(schedule).problems == ()


def test_relay_with_its_transfers() -> None:
    """Receives come ahead of their work, receipts come back as tokens, and every rank is told of the data."""
    schedule = staged("relay-dpu", RELAY[:2])
    assert schedule_table(schedule, transfers=True) == (
        "rank 0 | D@2   D@2>1 T0 T0>1   B0 U1<1 U0\n"
        "rank 1 | D@2<0 T1    B1 T0@1<0 U1 U1>0\n"
    )  # fmt: skip


def test_hybrid() -> None:
    schedule = staged("hybrid", HYBRID)
    assert schedule_table(schedule) == (
        "rank 0 | T0.0 B0.0 R0.0 U0.0\n"
        "rank 1 | T0.1 B0.1 R0.1 U0.1\n"
        "rank 2 | T1   T2   B1   U1   B2 U2\n"
    )  # fmt: skip
    relays = {(str(source), rank): part for (source, rank), part in schedule.structure.relays.items()}
    half = Fraction(1, 2)
    assert relays == {("T0F0@0", 2): (0, half), ("T0F1@0", 2): (half, 1)}


def test_dp_trains_one_block_with_all_of_the_teacher_before_it() -> None:
    assert schedule_table(alone("dp", 2, 2)) == (
        "rank 0 | T0.0 T1.0 T2.0 B2.0 R2.0 U2.0\n"
        "rank 1 | T0.1 T1.1 T2.1 B2.1 R2.1 U2.1\n"
    )  # fmt: skip
    assert edges(alone("dp", 2, 2).structure) == {(0, 1, Lane.INPUT)}


def test_ls_is_dp_on_one_rank() -> None:
    assert schedule_table(alone("ls", 1, 1)) == "rank 0 | T0 T1 B1 U1\n"
    assert edges(alone("ls", 1, 1).structure) == set()


def test_a_block_that_moves_comes_first_on_one_rank_and_last_on_the_other() -> None:
    assert work_of(half_a_block_moves(teacher_first=True)) == [
        "T0F0@1 T0F1@1 S0B0@0 S0U0@0 S0B1@0 S0U1@0 S1B1@0 S1U1@0",
        "S1B0@0 S1U0@0 T1F0@1 T2F0@1 T1F1@1 T2F1@1 S2B0@0 S2U0@0 S2B1@0 S2U1@0",
    ]
    assert work_of(half_a_block_moves(teacher_first=False)) == [
        "T0F0@1 S0B0@0 S0U0@0 T0F1@1 S0B1@0 S0U1@0 S1B1@0 S1U1@0",
        "S1B0@0 S1U0@0 T1F0@1 T2F0@1 S2B0@0 S2U0@0 T1F1@1 T2F1@1 S2B1@0 S2U1@0",
    ]


@pytest.mark.parametrize("teacher_first", [True, False])
def test_a_block_that_moves_never_waits(teacher_first: bool) -> None:
    """1 + 3 seconds, 1 + 2 and 1 + 2 are 10 a batch; each rank has 10 of a window's 20, and 2 of these in block 1."""
    profile = BlockProfile((line(1.0, 3.0), line(1.0, 2.0), line(1.0, 2.0)))
    schedule = half_a_block_moves(teacher_first)
    trace = simulate(schedule, BlockwiseCosts(profile, 1))
    assert (trace.seconds_per_step, trace.utilisation) == (pytest.approx(10.0), pytest.approx(1.0))
    assert {str(update): rank for update, rank in schedule.structure.moves} == {"S1U0@0": 0, "S1U1@0": 1}
    assert trace.by_block and trace.batches_per_step == 2


def test_a_rank_may_have_a_block_first_and_last() -> None:
    """Batch 0 and batch 2 on rank 0, batch 1 on rank 1 in between."""
    whole = range(3)
    student = [[Portion(0, range(1)), Portion(1, range(1, 2)), Portion(0, range(2, 3))], [Portion(0, whole)]]
    schedule = sliced(3, [[Portion(0, whole)], [Portion(1, whole)]], student, 2, teacher_first=True)
    assert work_of(schedule) == [
        "S0B0@0 S0U0@0 T0F0@1 T0F1@1 T0F2@1 S1B0@0 S1U0@0 S1B1@0 S1U1@0 S1B2@0 S1U2@0 S0B2@0 S0U2@0",
        "T1F0@1 T1F1@1 T1F2@1 S0B1@0 S0U1@0",
    ]
    check(schedule)


def test_three_ranks_take_a_block_in_turn() -> None:
    """The one in the middle trains it at the end of a window, since the first one needs its time before."""
    whole = range(3)
    student = [[Portion(rank, range(b, b + 1)) for b, rank in enumerate((2, 1, 0))], [Portion(1, whole)]]
    schedule = sliced(3, [[Portion(0, whole)], [Portion(1, whole)]], student, 3, teacher_first=True)
    assert work_of(schedule) == [
        "T0F0@1 T0F1@1 T0F2@1 S0B2@0 S0U2@0",
        "T1F0@1 T1F1@1 T1F2@1 S1B0@0 S1U0@0 S1B1@0 S1U1@0 S1B2@0 S1U2@0 S0B1@0 S0U1@0",
        "S0B0@0 S0U0@0",
    ]
    check(schedule)


def test_unequal_rows() -> None:
    third = Fraction(1, 3)
    both = [Portion(0, range(1), (Fraction(0), third)), Portion(1, range(1), (third, Fraction(1)))]
    schedule = sliced(1, [[Portion(0, range(1))]], [both], 2, teacher_first=True)
    assert schedule_table(schedule) == "rank 0 | T0@1 B0.0 R0.0 U0.0\nrank 1 | B0.1 R0.1 U0.1\n"
    assert {rank: part for (_, rank), part in schedule.structure.relays.items()} == {1: (third, 1)}


# ---------------------------------------------------------------- every schedule


@given(block_schedules)
@settings(deadline=None, max_examples=20)
def test_every_schedule_is_proved(schedule: Schedule) -> None:
    proof = check(schedule)
    assert (proof.problems, proof.staleness, len(proof.stash_peak)) == ((), 0, schedule.structure.num_ranks)


@given(st.data(), block_schedules)
@settings(deadline=None, max_examples=15)
def test_simulation_does_every_work_once_and_after_its_needs(data: st.DataObject, schedule: Schedule) -> None:
    """What another rank computes takes its time to arrive; a collective begins when its last rank is there."""
    structure, costs, num_steps = schedule.structure, data.draw(costs_of(schedule)), 3 + schedule.lookahead
    trace = simulate(schedule, costs, num_steps)
    done = {event.action: event for event in trace.events}
    expected = [a for step in range(num_steps) for a in structure.actions(step)]
    assert Counter(event.action for event in trace.events) == Counter(expected)
    free = defaultdict[int, float](float)
    for event in trace.events:
        assert event.rank == structure.rank_of(event.action)
        assert event.start >= free[event.rank] - 1e-9
        free[event.rank] = event.end
        for need in needs(event.action, structure):
            if need.step < 0:
                continue
            ready = done[need].end
            if done[need].rank != event.rank and event.action.op is not Op.REDUCE:
                ready += message_seconds(need, event.rank, structure, costs)
            assert event.start >= ready - 1e-9, (event, need)


# ---------------------------------------------------------------- tampering


@st.composite
def tampered(draw: st.DrawFn, schedule: Schedule) -> tuple[Schedule, int, Action]:
    """One action swapped with another, gone, doubled, of another step or on another rank; its rank before."""
    rank, i, action = draw(st.sampled_from(list(places(schedule))))
    row = schedule.rows[rank]
    way = draw(st.sampled_from(["swap", "drop", "double", "step", "rank"]))
    if way == "swap":
        return swapped(schedule, rank, i, draw(st.integers(0, len(row) - 1))), rank, action
    if way == "double":
        j = draw(st.integers(0, len(row)))
        return with_row(schedule, rank, (*row[:j], action, *row[j:])), rank, action
    if way == "step":
        return with_row(schedule, rank, (*row[:i], action.at(action.step + 1), *row[i + 1 :])), rank, action
    without = with_row(schedule, rank, (*row[:i], *row[i + 1 :]))
    if way == "drop" or schedule.structure.num_ranks == 1:
        return without, rank, action
    other = (rank + draw(st.integers(1, schedule.structure.num_ranks - 1))) % schedule.structure.num_ranks
    at = draw(st.integers(0, len(schedule.rows[other])))
    row = schedule.rows[other]
    return with_row(without, other, (*row[:at], action, *row[at:])), rank, action


@given(st.data(), block_schedules)
@settings(deadline=None, max_examples=25)
def test_tampered_schedules_are_refused_or_still_run(data: st.DataObject, schedule: Schedule) -> None:
    changed, _, _ = data.draw(tampered(schedule))
    try:
        check(changed)
    except ScheduleError:
        assert_refused(changed)
        return
    trace = simulate(changed, data.draw(costs_of(changed)), num_steps := 2 + changed.lookahead)
    expected = [a for step in range(num_steps) for a in changed.structure.actions(step)]
    assert Counter(event.action for event in trace.events) == Counter(expected)


@given(st.data(), block_schedules)
@settings(deadline=None, max_examples=12)
def test_what_is_missing_or_doubled_is_named(data: st.DataObject, schedule: Schedule) -> None:
    rank, i, action = data.draw(st.sampled_from(list(places(schedule))))
    row = schedule.rows[rank]
    for changed in ((*row[:i], *row[i + 1 :]), (*row[:i], action, *row[i:])):
        assert_refused(with_row(schedule, rank, changed), rank, action)


def test_work_on_another_rank_is_named() -> None:
    schedule = staged("hybrid", HYBRID)
    moved = next(a for a in schedule.rows[0] if str(a) == "S0B0@0")
    rows = tuple(tuple(a for a in row if a != moved) for row in schedule.rows)
    assert_refused(replace(schedule, rows=(rows[0], (*rows[1], moved), rows[2])), 1, moved)


def test_ranks_that_add_up_gradients_in_another_order_are_refused() -> None:
    """Each would wait in a collective for the other."""
    shares = equal_shares(range(2))
    structure = BlockwiseStructure(2, 1, (shares, shares), (shares, shares))
    orders = (
        "T0F0@0 T1F0@0 S0B0@0 S1B0@0 S0R0@0 S1R0@0 S0U0@0 S1U0@0",
        "T0F1@0 T1F1@0 S0B1@0 S1B1@0 S1R1@0 S0R1@0 S0U1@0 S1U1@0",
    )
    with pytest.raises(ScheduleError, match="rank 1: S1R1@0 is out of order: rank 0 of its group has S0R0@0 then"):
        check(connect("mine", structure, rows_of(*orders), (0, 0), 0))
    other = orders[1].replace("S0B1@0 S1B1@0 S1R1@0 S0R1@0", "S1B1@0 S0B1@0 S0R1@0 S1R1@0")
    with pytest.raises(ScheduleError, match="rank 1: S1B1@0 is out of order: rank 0 of its group has S0B0@0 then"):
        check(connect("mine", structure, rows_of(orders[0], other), (0, 0), 0))
