"""Schedules of blocks that train alone: their tables, their proof, and their text."""

from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule.blockwise.block_tasks import block_schedules, costs_of, line, sliced_schedules
from schedule.tasks import assert_refused, places, rows_of, swapped, with_row, work_of

from pipestill.draw import schedule_table
from pipestill.errors import ScheduleError
from pipestill.schedule import KINDS, Action, Kind, Lane, Op, Schedule, check, generate
from pipestill.schedule.blockwise.costs import BlockwiseCosts
from pipestill.schedule.blockwise.generate import AHEAD, Portion, alone, sliced, staged
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.schedule.blockwise.shares import equal_shares
from pipestill.schedule.blockwise.structure import BlockwiseStructure
from pipestill.schedule.comms import connect, edges
from pipestill.schedule.needs import lane, needs
from pipestill.schedule.simulate import message_seconds, simulate

RELAY = [(range(1), (0,)), (range(1, 2), (1,)), (range(2, 4), (2,))]
HYBRID = [(range(1), (0, 1)), (range(1, 3), (2,))]


def blocks_of(schedule: Schedule) -> BlockwiseStructure:
    return schedule.structure


# ---------------------------------------------------------------- tables


def test_relay() -> None:
    schedule = staged("relay-dpu", RELAY)
    assert schedule_table(schedule) == (
        "rank 0 | T0 B0 U0\n"
        "rank 1 | T1 B1 U1\n"
        "rank 2 | T2 T3 B2 U2 B3 U3\n"
    )  # fmt: skip
    assert blocks_of(schedule).ahead == AHEAD
    assert check(schedule).problems == ()


def test_relay_with_its_transfers() -> None:
    """Receives come ahead of their work, receipts come back as tokens, and every rank is told of the data."""
    schedule = staged("relay-dpu", RELAY[:2])
    assert schedule_table(schedule, transfers=True) == (
        "rank 0 | D@2   D@2>1 T0 T0>1   B0 U1<1 U0\n"
        "rank 1 | D@2<0 T1    B1 T0@1<0 U1 U1>0\n"
    )  # fmt: skip


def test_relay_with_a_barrier_waits_for_all_updates_of_the_step_before() -> None:
    structure = blocks_of(staged("relay", RELAY, barrier=True))
    first = Action.parse("T2F0@7")
    assert {str(need) for need in needs(first, structure)} == {
        "S0D@7", "T1F0@7", "S0U0@6", "S1U0@6", "S2U0@6", "S3U0@6"
    }  # fmt: skip
    assert {str(need) for need in needs(Action.parse("T1F0@7"), replace(structure, barrier=False))} == {
        "S0D@7", "T0F0@7", "S2U0@4"
    }  # fmt: skip


def test_hybrid() -> None:
    schedule = staged("hybrid", HYBRID)
    assert schedule_table(schedule) == (
        "rank 0 | T0.0 B0.0 R0.0 U0.0\n"
        "rank 1 | T0.1 B0.1 R0.1 U0.1\n"
        "rank 2 | T1   T2   B1   U1   B2 U2\n"
    )  # fmt: skip
    relays = {(str(source), rank): part for (source, rank), part in blocks_of(schedule).relays.items()}
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


def half_a_block_moves(teacher_first: bool) -> Schedule:
    """Block 0 is rank 0's. Block 1 is rank 1's for batch 0 and rank 0's for batch 1; block 2 is rank 1's."""
    whole = range(2)
    teacher = [[Portion(0, whole)], [Portion(1, whole)], [Portion(1, whole)]]
    student = [[Portion(0, whole)], [Portion(0, range(1, 2)), Portion(1, range(1))], [Portion(1, whole)]]
    return sliced(2, teacher, student, 2, teacher_first=teacher_first)


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
    assert {str(update): rank for update, rank in blocks_of(schedule).moves} == {"S1U0@0": 0, "S1U1@0": 1}
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
    assert {rank: part for (_, rank), part in blocks_of(schedule).relays.items()} == {1: (third, 1)}


# ---------------------------------------------------------------- every schedule


@given(block_schedules)
@settings(deadline=None, max_examples=60)
def test_every_schedule_is_proved(schedule: Schedule) -> None:
    proof = check(schedule)
    assert (proof.problems, proof.staleness, len(proof.stash_peak)) == ((), 0, schedule.structure.num_ranks)


@given(st.data(), block_schedules)
@settings(deadline=None, max_examples=60)
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


@given(sliced_schedules())
@settings(deadline=None, max_examples=40)
def test_work_needs_no_sender_that_runs_further_ahead_than_the_bound(schedule: Schedule) -> None:
    """A teacher's forward whose output leaves its rank waits for the receipts of `ahead` + 1 steps before."""
    structure = blocks_of(schedule)
    for (source, rank), _ in structure.relays.items():
        step = 1 + structure.ahead
        receipts = [need for need in needs(source.at(step), structure) if need.step == 0]
        assert any(structure.rank_of(receipt) == rank for receipt in receipts)


@given(block_schedules)
@settings(deadline=None, max_examples=40)
def test_transfers_of_one_result_share_a_lane_at_both_ends(schedule: Schedule) -> None:
    structure = schedule.structure
    for rank, row in enumerate(schedule.rows):
        for action in row:
            if action.kind is Kind.SEND and action.op is not Op.DATA:
                assert action.peer is not None
                on = lane(action, action.peer, structure)
                assert on is lane(action.payload.receive_from(rank), action.peer, structure)
                assert (rank, action.peer, on) in edges(structure)


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
@settings(deadline=None, max_examples=100)
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
@settings(deadline=None, max_examples=40)
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


# ---------------------------------------------------------------- text


@given(block_schedules)
@settings(deadline=None, max_examples=60)
def test_text_round_trip(schedule: Schedule) -> None:
    assert Schedule.from_text(schedule.to_text(), *KINDS) == schedule


def test_text() -> None:
    third = Fraction(1, 3)
    both = [
        Portion(0, range(1), (Fraction(0), third)),
        Portion(1, range(1), (third, Fraction(1))),
        Portion(1, range(1, 2)),
    ]
    whole = range(2)
    schedule = sliced(2, [[Portion(0, whole)], [Portion(1, whole)]], [both, []], 2, teacher_first=True)
    head, rows = schedule.to_text().split("rank 0: ")
    assert head == (
        "pipestill schedule 1\n"
        "strategy: balanced\n"
        "ranks: 2\n"
        "window: 2\n"
        "barrier: no\n"
        "ahead: 1\n"
        "teacher 0: 0@0 1@0\n"
        "teacher 1: 0@1 1@1\n"
        "student 0: 0@0:0-1/3 0@1:1/3-1 1@1\n"
        "student 1: none\n"
        "stash: 0 0\n"
        f"run ahead: {schedule.run_ahead}\n"
    )
    assert rows == " ".join(map(str, schedule.rows[0])) + "\nrank 1: " + " ".join(map(str, schedule.rows[1])) + "\n"
    assert Schedule.from_text(head + "rank 0: " + rows, *KINDS) == schedule


@pytest.mark.parametrize("schedule", [staged("relay", RELAY, barrier=True), half_a_block_moves(teacher_first=True)])
def test_text_without_one_of_its_lines(schedule: Schedule) -> None:
    lines = schedule.to_text().splitlines()
    for i, gone in enumerate(lines):
        with pytest.raises(ValueError, match="schedule") as error:
            Schedule.from_text("\n".join([*lines[:i], *lines[i + 1 :]]), *KINDS)
        assert gone.split(":")[0] in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("window: 1", "window: one", "'window: one' in a schedule: expected a whole number"),
        ("window: 1", "window: 2", "the shares of student block 0 are not all rows of batch 1 once"),
        ("barrier: no", "barrier: maybe", "'barrier: maybe' in a schedule: expected yes or no"),
        ("ranks: 3", "ranks: 4", "4 ranks, of which 3 have nothing to do"),
        ("ranks: 3", "ranks: 2", "for 2 ranks and a window of 1 batches"),
        ("ranks: 3", "ranks: 3\nviews: 1", "lines that mean nothing: views"),
        ("teacher 0: 0@0:0-1/2 0@1:1/2-1", "teacher 0:", "'teacher 0: ... ' in a schedule: expected shares like 0@1"),
        ("teacher 0: 0@0", "teacher 0: 0", "'teacher 0: ... 0:0-1/2' in a schedule: expected shares like 0@1"),
        ("teacher 0: 0@0:0-1/2", "teacher 0: 0@0:0-1/0", "'teacher 0: ... 0@0:0-1/0' in a schedule: expected shares"),
        ("teacher 0: 0@0:0-1/2", "teacher 0: 0@0:0-0.5", "'teacher 0: ... 0@0:0-0.5' in a schedule: expected shares"),
        ("teacher 0: 0@0:0-1/2", "teacher 0: 0@0:1-1/2", "... 0@0:1-1/2' in a schedule: a share of rows 1 to 1/2"),
        ("teacher 0: 0@0:0-1/2", "teacher 0: 0@0:0-1/3", "teacher block 0 does not have all rows once"),
        ("student 1: 0@2", "student 999999999: 0@2", "the schedule lacks the line 'teacher 3'"),
        ("S1U0@0", "S1X0@0", "'S1X0@0<2' is not an action"),
    ],
)
def test_malformed_text(old: str, new: str, message: str) -> None:
    text = staged("hybrid", HYBRID).to_text()
    assert old in text
    with pytest.raises(ValueError, match=message):
        Schedule.from_text(text.replace(old, new, 1), *KINDS)


def test_rows_of_another_structure_are_refused() -> None:
    text = staged("hybrid", HYBRID).to_text().replace("student 1: 0@2", "student 1: none")
    with pytest.raises(ScheduleError, match="rank 2: S1B0@0 is not part of the step"):
        check(Schedule.from_text(text, *KINDS))


def test_lines_of_both_kinds_do_not_mix() -> None:
    text = generate("1f1b", 2, 2).to_text().replace("microbatches: 2", "microbatches: 2\nwindow: 2")
    with pytest.raises(ValueError, match="lines that mean nothing: window"):
        Schedule.from_text(text, *KINDS)
