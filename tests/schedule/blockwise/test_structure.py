"""What blockwise work needs, on which lanes results travel, and the text of a structure."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st
from schedule.blockwise.tasks import (
    HYBRID,
    RELAY,
    block_schedules,
    costs_of,
    groups,
    half_a_block_moves,
    line,
    profiles,
    sliced_schedules,
)

from pipestill.costs import Link
from pipestill.errors import ScheduleError
from pipestill.plan.blockwise.cost_model import stage_seconds
from pipestill.schedule import KINDS, Action, Kind, Op, Role, Schedule, Trace, check, generate
from pipestill.schedule.blockwise.generate import Portion, sliced, staged
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes
from pipestill.schedule.blockwise.shares import Share, equal_shares
from pipestill.schedule.blockwise.structure import BlockwiseCosts, BlockwiseStructure
from pipestill.schedule.comms import edges
from pipestill.schedule.simulate import message_seconds, simulate
from pipestill.schedule.structure import lane, needs


@given(block_schedules)
@settings(deadline=None, max_examples=10)
def test_every_block_ends_its_batch_on_the_ranks_that_share_it(schedule: Schedule) -> None:
    structure = schedule.structure
    for action in structure.actions():
        if action.role is Role.STUDENT and action.op is not Op.DATA:
            sharers = structure.sharers(action)
            assert action in sharers
            assert sum(s.part[1] - s.part[0] for s in map(structure.share_of, sharers)) == 1
            ranks = [structure.rank_of(a) for a in sharers]
            assert len(set(ranks)) == len(ranks)


def test_relay_with_a_barrier_waits_for_all_updates_of_the_step_before() -> None:
    structure = staged("relay", RELAY, barrier=True).structure
    first = Action.parse("T2F0@7")
    assert {str(need) for need in needs(first, structure)} == {
        "S0D@7", "T1F0@7", "S0U0@6", "S1U0@6", "S2U0@6", "S3U0@6"
    }  # fmt: skip
    assert {str(need) for need in needs(Action.parse("T1F0@7"), replace(structure, barrier=False))} == {
        "S0D@7", "T0F0@7", "S2U0@4"
    }  # fmt: skip


@given(sliced_schedules())
@settings(deadline=None, max_examples=10)
def test_work_needs_no_sender_that_runs_further_ahead_than_the_bound(schedule: Schedule) -> None:
    """A teacher's forward whose output leaves its rank waits for the receipts of `ahead` + 1 steps before."""
    structure = schedule.structure
    for (source, rank), _ in structure.relays.items():
        step = 1 + structure.ahead
        receipts = [need for need in needs(source.at(step), structure) if need.step == 0]
        assert any(structure.rank_of(receipt) == rank for receipt in receipts)


@given(block_schedules)
@settings(deadline=None, max_examples=10)
def test_transfers_of_one_result_share_a_lane_at_both_ends(schedule: Schedule) -> None:
    structure = schedule.structure
    for rank, row in enumerate(schedule.rows):
        for action in row:
            if action.kind is Kind.SEND and action.op is not Op.DATA:
                assert action.peer is not None
                on = lane(action, action.peer, structure)
                assert on is lane(action.payload.receive_from(rank), action.peer, structure)
                assert (rank, action.peer, on) in edges(structure)


@given(block_schedules)
@settings(deadline=None, max_examples=15)
def test_text_round_trip(schedule: Schedule) -> None:
    assert Schedule.from_text(schedule.to_text(), *KINDS) == schedule


def test_text() -> None:
    third = Fraction(1, 3)
    both = [Portion(0, range(1), (Fraction(0), third)), Portion(1, range(1), (third, Fraction(1))), Portion(1, range(1, 2))]
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


PROFILE = BlockProfile((line(1.0, 2.0, 80, 10), line(3.0, 5.0, 120, 20), line(7.0, 11.0, 0, 40)), Link(0.5, 100.0))
TWO_AND_ONE = BlockwiseStructure(
    3, 1, (equal_shares([0, 1]), equal_shares([2]), equal_shares([2])), (equal_shares([0, 1]), equal_shares([2]), ())
)


def seconds(costs: BlockwiseCosts, action: str) -> float:
    return TWO_AND_ONE.work_seconds(Action.parse(action), costs)


def test_seconds_of_work() -> None:
    costs = BlockwiseCosts(PROFILE, 6)
    exchange = 2 * (1 / 2) * 80 / 100 + 2 * 0.5
    work = {"T0F1@0": 3.0, "S0B1@2": 6.0, "S0R0@1": exchange, "S0U0@0": 0.0, "S0D@0": 0.0, "T1F0@0": 18.0, "S1B0@0": 30.0}
    assert {action: seconds(costs, action) for action in work} == work
    assert seconds(BlockwiseCosts(PROFILE, 5), "T0F1@0") == 2.5  # halves, as in the cost model, though rows are whole


def test_work_is_as_fast_as_its_rank_and_links_are_as_fast_as_they_are() -> None:
    costs = BlockwiseCosts(PROFILE, 6, (1.0, 4.0, 2.0))
    assert [seconds(costs, a) for a in ("S0B0@0", "S0B1@0", "T1F0@0", "S0R1@0")] == [6.0, 1.5, 9.0, 1.8]
    assert costs.on([1, 2]).speeds == (4.0, 2.0)
    assert BlockwiseCosts(PROFILE, 6).on([1]) == BlockwiseCosts(PROFILE, 6)
    assert (costs.link, costs.interference) == (PROFILE.link, 1.0)


def test_seconds_of_relays() -> None:
    """Block 0's output is block 1's input: 20 bytes a row."""
    costs = BlockwiseCosts(PROFILE, 6)
    assert TWO_AND_ONE.transfer_seconds(Action.parse("T0F1@4>2"), 2, costs) == 0.5 + 3 * 20 / 100
    third = Fraction(1, 3)
    shares = (Share(0, 0, (Fraction(0), third)), Share(0, 1, (third, Fraction(1))))
    structure = BlockwiseStructure(2, 1, (equal_shares([1]), shares), ((), ()))
    assert structure.transfer_seconds(Action.parse("T0F0@4>0"), 0, costs) == pytest.approx(0.5 + 2 * 20 / 100)


def test_the_last_output_is_as_large_as_its_input() -> None:
    assert [PROFILE.output_bytes_per_row(block) for block in range(3)] == [20, 40, 40]


@pytest.mark.parametrize(("state", "moved"), [(0, 240), (300, 180), (100, 240), (120, 240)])
def test_seconds_of_a_block_that_moves(state: int, moved: int) -> None:
    """Weights and optimizer state, without the gradients; as large as each other where the profile does not say."""
    profile = BlockProfile((BlockTimes("block", (1,), (1.0,), (1.0,), 10, 120, 0, state),), Link(0.5, 100.0))
    structure = BlockwiseStructure(2, 2, ((Share(0, 0), Share(1, 0)),), ((Share(0, 0), Share(1, 1)),))
    costs = BlockwiseCosts(profile, 6)
    assert structure.transfer_seconds(Action.parse("S0U0@0>1"), 1, costs) == 0.5 + moved / 100


@given(st.data(), groups())
@settings(deadline=None, max_examples=8)
def test_tokens_take_a_latency(data: st.DataObject, held: list[tuple[range, tuple[int, ...]]]) -> None:
    schedule = staged("relay", held, barrier=True)
    costs = data.draw(costs_of(schedule))
    for row in schedule.rows:
        for action in row:
            if action.peer is not None and lane(action, action.peer, schedule.structure).value == "token":
                taken = message_seconds(action, action.peer, schedule.structure, costs)
                assert taken == costs.link.latency_seconds


@given(st.data(), groups())
@settings(deadline=None, max_examples=15)
def test_stages_take_what_the_cost_model_says(data: st.DataObject, held: list[tuple[range, tuple[int, ...]]]) -> None:
    """Relays and updates apart: a simulated step is never longer than the slowest stage, nor shorter than its work."""
    num_blocks = held[-1][0].stop
    profile = data.draw(profiles(st.just(num_blocks)))
    batch = data.draw(st.integers(1, 40))
    free = replace(profile, link=Link(0.0, profile.link.bytes_per_second))
    worst = [stage_seconds(free, blocks.start, blocks.stop, len(ranks), batch) for blocks, ranks in held]
    relays = [free.relay_seconds(blocks.start, batch, len(ranks)) if blocks.start else 0 for blocks, ranks in held]
    work = max(seconds - relay for seconds, relay in zip(worst, relays, strict=True))
    trace = simulate(staged("hybrid", held), BlockwiseCosts(free, batch), 40)
    assert isinstance(trace, Trace)
    if trace.seconds_per_step:
        assert trace.seconds_per_step >= work * (1 - 1e-9)
        if max(relays) == 0:
            assert trace.seconds_per_step == pytest.approx(work, rel=1e-6)


def test_teacher_and_student_are_told_apart() -> None:
    costs = BlockwiseCosts(PROFILE, 1)
    for role, expected in ((Role.TEACHER, 7.0), (Role.STUDENT, 11.0)):
        structure = BlockwiseStructure(1, 1, (equal_shares([0]),) * 3, (equal_shares([0]),) * 3)
        action = Action.parse("T2F0@0" if role is Role.TEACHER else "S2B0@0")
        assert structure.work_seconds(action, costs) == expected
