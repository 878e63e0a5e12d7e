"""Sends, receives and reads of the data that the pass adds to rows of work."""

from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st
from schedule.tasks import Task, lists_of, tasks, texts_of

from pipestill.schedule import Action, Kind, Lane, Op, PipelineStructure, Schedule, check, generate
from pipestill.schedule.comms import connect, edges
from pipestill.schedule.deadlock import never_stuck
from pipestill.schedule.structure import crossings, lane, needs

pytestmark = pytest.mark.usefixtures("_short_search")


def schedules() -> st.SearchStrategy[Schedule]:
    return tasks(most_units=6).map(Task.schedule)


def test_one_rank_needs_no_transfer() -> None:
    row = lists_of("S0F0@0 S0L0@0 S0B0@0 S0U@0")
    assert texts_of(connect("x", PipelineStructure((0,), (), 1), row, (1,), 0).rows) == ["S0D@1 S0F0@0 S0L0@0 S0B0@0 S0U@0"]


def test_two_ranks() -> None:
    """A send follows its work; a receive is posted one action before the work that needs it."""
    rows = lists_of("S0F0@0 S0F1@0 S0B0@0 S0B1@0 S0U@0", "S1F0@0 S1L0@0 S1B0@0 S1F1@0 S1L1@0 S1B1@0 S1U@0")
    assert texts_of(connect("x", PipelineStructure((0, 1), (), 2), rows, (2, 1), 0).rows) == [
        "S0D@2 S0D@2>1 S0F0@0 S0F0@0>1 S1B0@0<1 S0F1@0 S0F1@0>1 S1B1@0<1 S0B0@0 S0B1@0 S0U@0",
        "S0D@2<0 S1F0@0 S1L0@0 S0F1@0<0 S1B0@0 S1B0@0>0 S1F1@0 S1L1@0 S1B1@0 S1B1@0>0 S0F0@1<0 S1U@0",
    ]


def test_a_result_goes_once_to_each_rank_that_needs_it() -> None:
    """The last teacher stage feeds the loss on rank 0 and, in serial order, the student's start on rank 1."""
    structure = PipelineStructure(student_ranks=(1, 0), teacher_ranks=(2,), num_microbatches=1, serial=True)
    rows = lists_of("S1F0@0 S1L0@0 S1B0@0 S1U@0", "S0F0@0 S0B0@0 S0U@0", "T0F0@0")
    schedule = connect("x", structure, rows, (1, 1, 0), 9)
    check(schedule)
    sent = [a for a in schedule.rows[2] if a.kind is Kind.SEND]
    assert [str(a) for a in sent] == ["T0F0@0>1", "T0F0@0>0"]
    assert [lane(a, a.peer, structure) for a in sent if a.peer is not None] == [Lane.TOKEN, Lane.TEACHER]


@given(schedules())
@settings(max_examples=8, deadline=None)
def test_work_keeps_its_order(schedule: Schedule) -> None:
    """The pass adds and moves nothing else: taking its work out and putting it through again gives the same."""
    work = [[a for a in row if a.computes and a.op is not Op.DATA] for row in schedule.rows]
    again = connect(schedule.strategy, schedule.structure, work, schedule.stash, schedule.run_ahead)
    assert again == schedule


@given(schedules())
@settings(max_examples=8, deadline=None)
def test_every_crossing_once(schedule: Schedule) -> None:
    transfers = [(rank, a) for rank, row in enumerate(schedule.rows) for a in row if not a.computes]
    for payload, source, destination in crossings(schedule.structure):
        assert [a.step for r, a in transfers if (r, a.at(0)) == (source, payload.send_to(destination))] != []
        assert [a.step for r, a in transfers if (r, a.at(0)) == (destination, payload.receive_from(source))] != []
    assert len(transfers) == 2 * len(crossings(schedule.structure))


@given(schedules())
@settings(max_examples=8, deadline=None)
def test_sends_follow_their_work(schedule: Schedule) -> None:
    for row in schedule.rows:
        for before, action in pairwise(row):
            if action.kind is Kind.SEND:
                assert before.payload == action.payload


@given(schedules())
@settings(max_examples=8, deadline=None)
def test_data_is_read_before_anything_of_its_step(schedule: Schedule) -> None:
    """And at the head of every row, so that sizes of buffers are known."""
    for row in schedule.rows:
        assert row[0].op is Op.DATA
        assert row[0].step == schedule.lookahead
        assert all(a.step < row[0].step for a in row if a.op is not Op.DATA)


@given(schedules())
@settings(max_examples=8, deadline=None)
def test_never_stuck_on_any_transport(schedule: Schedule) -> None:
    assert never_stuck(schedule)


@given(schedules())
@settings(max_examples=8, deadline=None)
def test_receives_are_posted_before_the_work_that_needs_them(schedule: Schedule) -> None:
    for rank, row in enumerate(schedule.unroll(3)):
        posted = set[Action]()
        for action in row:
            if action.kind is Kind.RECEIVE:
                posted.add(action.payload)
            elif action.computes:
                for need in needs(action, schedule.structure):
                    assert need.step < 0 or schedule.structure.rank_of(need) == rank or need in posted


def test_two_ranks_with_norms_and_momentum() -> None:
    """All norms leave before any is waited for; the teacher's weights move without a word to anyone."""
    structure = PipelineStructure((0, 1), (0, 1), 1, momentum=True, clip=True)
    rows = lists_of("T0F0@0 S0F0@0 S0B0@0 S0N@0 S0U@0 T0E@0", "T1F0@0 S1F0@0 S1L0@0 S1B0@0 S1N@0 S1U@0 T1E@0")
    schedule = connect("x", structure, rows, (1, 1), 1)
    check(schedule)
    assert texts_of(schedule.rows) == [
        "S0D@2 S0D@2>1 T0F0@0 T0F0@0>1 S1B0@0<1 S0F0@0 S0F0@0>1 S0B0@0 S1N@0<1 S0N@0 S0N@0>1 S0U@0 T0E@0",
        "S0D@2<0 S0F0@0<0 T1F0@0 S1F0@0 S1L0@0 S1B0@0 S1B0@0>0 S0N@0<0 S1N@0 S1N@0>0 S1U@0 T0F0@1<0 T1E@0",
    ]


def test_edges_of_a_pipeline() -> None:
    """One channel a lane and direction; targets of the data go to the rank of the loss."""
    assert edges(PipelineStructure((0, 1, 2), (0, 1, 2), 2)) == {
        (0, 1, Lane.TEACHER),
        (1, 2, Lane.TEACHER),
        (0, 1, Lane.ACTIVATION),
        (1, 2, Lane.ACTIVATION),
        (2, 1, Lane.GRADIENT),
        (1, 0, Lane.GRADIENT),
        (0, 2, Lane.TARGET),
    }
    assert edges(PipelineStructure((0, 1), (0, 1), 1, serial=True)) >= {(1, 0, Lane.TOKEN)}
    assert edges(PipelineStructure((0, 1), (), 1, clip=True)) == {
        (0, 1, Lane.ACTIVATION),
        (1, 0, Lane.GRADIENT),
        (0, 1, Lane.NORM),
        (1, 0, Lane.NORM),
        (0, 1, Lane.TARGET),
    }
    momentum = PipelineStructure((0, 1), (0, 1), 1, momentum=True, split=True)  # neither update nor second half leaves its rank
    assert edges(momentum) == edges(PipelineStructure((0, 1), (0, 1), 1))
    assert edges(PipelineStructure((0,), (0,), 4)) == set()


def test_rows_that_no_transfer_can_save_come_back_to_be_refused() -> None:
    """`connect` gives up on an order that is stuck by itself, and `check` says why."""
    rows = lists_of("S0B0@0 S0F0@0 S0U@0", "S1F0@0 S1L0@0 S1B0@0 S1U@0")
    schedule = connect("x", PipelineStructure((0, 1), (), 1), rows, (1, 1), 0)
    with pytest.raises(Exception, match=r"rank 0: S0B0@0 waits for S0F0@0 for ever \(deadlock with buffered sends\)"):
        check(schedule)


def test_longer_lead_only_where_shorter_gets_stuck() -> None:
    """Posting early costs buffers: every receive of 1F1B stands as late as rendezvous sends allow."""
    schedule = generate("1f1b", 2, 3)
    for rank, row in enumerate(schedule.rows):
        for i, action in enumerate(row[:-1]):
            if action.kind is Kind.RECEIVE and action.op is not Op.DATA:
                after = [a for a in row[i + 1 :] if a.computes]
                wanted = [a for a in after if action.payload in needs(a, schedule.structure)]
                if wanted:  # not posted for the next period
                    assert after.index(wanted[0]) <= 1, f"rank {rank} posts {action} early"


def test_structure_and_bounds_are_kept() -> None:
    structure = PipelineStructure((0,), (), 1)
    schedule = connect("name", structure, lists_of("S0F0@0 S0L0@0 S0B0@0 S0U@0"), (7,), 5)
    assert (schedule.strategy, schedule.structure, schedule.stash, schedule.run_ahead) == ("name", structure, (7,), 5)
