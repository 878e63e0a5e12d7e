"""What the checker proves, and that it refuses every schedule that was tampered with."""

from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st
from schedule.tasks import assert_refused, places, rows_of, swapped, with_row
from schedule.valid import STALE, VALID, each_schedule

from pipestill.costs import StageCosts
from pipestill.errors import ScheduleError
from pipestill.schedule import Action, Kind, Op, PipelineStructure, Schedule, check
from pipestill.schedule.check import examine
from pipestill.schedule.comms import connect
from pipestill.schedule.simulate import simulate
from pipestill.schedule.structure import lane, needs

# ---------------------------------------------------------------- what is valid


@pytest.mark.parametrize("name", VALID)
def test_valid(name: str) -> None:
    schedule = VALID[name]
    proof = check(schedule)
    assert proof.problems == ()
    assert proof.staleness == int(name in STALE)
    if name == "ema-split":  # one bound for all ranks, which the last need not use
        assert proof.stash_peak[0] == schedule.stash[0]
    else:
        assert proof.stash_peak == schedule.stash
    if name in ("tspipe", "async"):
        assert proof.run_ahead <= schedule.run_ahead
    else:
        assert proof.run_ahead == schedule.run_ahead


def test_all_problems_come_at_once() -> None:
    schedule = VALID["1f1b"]
    broken = replace(with_row(schedule, 1, schedule.rows[1][:-1]), stash=(1, 1, 1))
    problems = examine(broken).problems
    assert "rank 1: S1U@0 stands 0 times in the period, expected once" in problems
    assert any("rank 0:" in p and "the bound is 1" in p for p in problems)


# ---------------------------------------------------------------- one action is wrong


@each_schedule
def test_missing_action(schedule: Schedule) -> None:
    """Work, sends, receives and reads of the data alike."""
    for rank, i, action in places(schedule):
        row = schedule.rows[rank]
        assert_refused(with_row(schedule, rank, row[:i] + row[i + 1 :]), rank, action)


@each_schedule
def test_action_that_stands_twice(schedule: Schedule) -> None:
    for rank, i, action in places(schedule):
        row = schedule.rows[rank]
        j = i if i % 2 else len(row)
        assert_refused(with_row(schedule, rank, (*row[:j], action, *row[j:])), rank, action)


@each_schedule
def test_action_on_another_rank(schedule: Schedule) -> None:
    for rank, i, action in places(schedule):
        moved = with_row(schedule, rank, schedule.rows[rank][:i] + schedule.rows[rank][i + 1 :])
        for other in range(schedule.structure.num_ranks):
            if other != rank:
                there = moved.rows[other]
                j = 0 if i % 2 else len(there)
                assert_refused(with_row(moved, other, (*there[:j], action, *there[j:])), rank, action)


@each_schedule
def test_action_of_another_step(schedule: Schedule) -> None:
    """Work of a wrong step reads a wrong version, comes out of order or is never ready; a transfer overtakes others."""
    for rank, i, action in places(schedule):
        for step in {action.step - 1, action.step + 1} - {-1}:
            row = list(schedule.rows[rank])
            row[i] = action.at(step)
            if action.op is Op.NORM and action.kind is Kind.RECEIVE:  # one a step: it may as well be posted a step early
                check(with_row(schedule, rank, row))
            else:
                assert_refused(with_row(schedule, rank, row))


@each_schedule
def test_action_of_another_microbatch_or_stage(schedule: Schedule) -> None:
    for rank, i, action in places(schedule):
        others = [replace(action, stage=action.stage + 1)]
        if action.microbatch is not None:
            others.append(replace(action, microbatch=action.microbatch + 1))
        for other in others:
            row = list(schedule.rows[rank])
            row[i] = other
            assert_refused(with_row(schedule, rank, tuple(row)), rank, action)


@each_schedule
def test_transfer_with_another_peer(schedule: Schedule) -> None:
    for rank, i, action in places(schedule):
        if action.peer is not None:
            row = list(schedule.rows[rank])
            for peer in {*range(schedule.structure.num_ranks), 99} - {action.peer}:
                row[i] = replace(action, peer=peer)
                assert_refused(with_row(schedule, rank, tuple(row)), rank, action)


def test_work_that_is_no_part_of_the_step() -> None:
    schedule = VALID["forward-only"]
    extra = Action.parse("S1B0@0")
    problems = examine(with_row(schedule, 1, (*schedule.rows[1], extra))).problems
    assert "rank 1: S1B0@0 is not part of the step" in problems


def test_data_told_for_another_step_than_is_read() -> None:
    """The last message would still be on its way when the run ends."""
    schedule = VALID["1f1b"]
    row = list(schedule.rows[1])
    assert row[0].op is Op.DATA
    row[0] = row[0].at(row[0].step + 1)
    assert_refused(with_row(schedule, 1, tuple(row)), 0, Action.parse("S0D@0"))


def test_data_read_no_sooner_than_its_own_step() -> None:
    """A period starts by asking for its batch, which must have been read by then."""
    structure = PipelineStructure((0,), (), 1)
    schedule = Schedule("late", structure, rows_of("S0D@0 S0F0@0 S0L0@0 S0B0@0 S0U@0"), (1,), run_ahead=0)
    assert examine(schedule).problems == ("rank 0: S0D@0 is of step 0, expected step 1 of the data on every rank",)


# ---------------------------------------------------------------- the order is wrong


def same_lane(a: Action, b: Action, structure: PipelineStructure, rank: int) -> bool:
    if a.computes or a.kind is not b.kind or a.peer is None or a.peer != b.peer:
        return False
    destination = a.peer if a.kind is Kind.SEND else rank
    return lane(a, destination, structure) is lane(b, destination, structure)


@each_schedule
def test_swap_of_two_actions_where_one_needs_the_other(schedule: Schedule) -> None:
    for rank, j, later in places(schedule):
        wanted = needs(later, schedule.structure)
        for i, earlier in enumerate(schedule.rows[rank][:j]):
            if (earlier.computes and earlier in wanted) or (earlier.kind is Kind.RECEIVE and earlier.payload in wanted):
                assert_refused(swapped(schedule, rank, i, j), rank, later)


@each_schedule
def test_swap_of_two_transfers_on_the_same_lane(schedule: Schedule) -> None:
    for rank, j, later in places(schedule):
        for i, earlier in enumerate(schedule.rows[rank][:j]):
            if same_lane(earlier, later, schedule.structure, rank):
                assert_refused(swapped(schedule, rank, i, j))


@each_schedule
def test_swap_of_two_microbatches(schedule: Schedule) -> None:
    """Gradients would add up in another order, and running statistics move in another, than in a plain loop."""
    for rank, j, later in places(schedule):
        for i, earlier in enumerate(schedule.rows[rank][:j]):
            same = (earlier.role, earlier.stage, earlier.op) == (later.role, later.stage, later.op)
            if same and earlier.computes and later.computes:
                assert_refused(swapped(schedule, rank, i, j), rank)


def test_gradients_in_reverse_order() -> None:
    """Nothing is missing and no rank gets stuck: only the sum would round differently."""
    structure = PipelineStructure((0,), (), 3)
    rows = rows_of("S0F0@0 S0F1@0 S0F2@0 S0L0@0 S0L1@0 S0L2@0 S0B2@0 S0B1@0 S0B0@0 S0U@0")
    problems = examine(connect("reverse", structure, rows, (3,), run_ahead=0)).problems
    assert "rank 0: S0B1@0 runs after S0B2@0; a stage takes microbatches in order" in problems


def test_update_before_its_last_backward() -> None:
    for name in ("sequential", "gpipe", "1f1b", "fill"):
        schedule = VALID[name]
        for rank, row in enumerate(schedule.rows):
            update = next(a for a in row if a.op is Op.UPDATE)
            rest = [a for a in row if a is not update]
            last = max(i for i, a in enumerate(rest) if a.op is Op.BACKWARD and a.computes)
            early = with_row(schedule, rank, (*rest[:last], update, *rest[last:]))
            assert_refused(early, rank, update)
            stuck = f"rank {rank}: {update} waits for {rest[last]} for ever"
            assert any(stuck in problem for problem in examine(early).problems)


def changed(schedule: Schedule, rank: int, text: str, before: str) -> Schedule:
    """The work that prints as `text` moved to stand right before another in its row."""
    row = list(schedule.rows[rank])
    row.remove(Action.parse(text))
    row.insert(row.index(Action.parse(before)), Action.parse(text))
    return with_row(schedule, rank, row)


def test_update_before_its_last_weight_gradient() -> None:
    early = changed(VALID["ema-split"], 1, "S1U@0", before="S1W1@0")
    assert_refused(early, 1, Action.parse("S1U@0"))
    assert any("rank 1: S1U@0 waits for S1W1@0 for ever" in problem for problem in examine(early).problems)


def test_weight_gradient_before_that_of_its_input() -> None:
    early = changed(VALID["ema-split"], 0, "S0W0@0", before="S0I0@0")
    assert any("rank 0: S0W0@0 waits for S0I0@0 for ever" in problem for problem in examine(early).problems)


def test_update_before_its_norm() -> None:
    early = changed(VALID["ema"], 0, "S0U@0", before="S0N@0")
    assert any("rank 0: S0U@0 waits for S0N@0 for ever" in problem for problem in examine(early).problems)


def test_teacher_that_moves_before_the_student() -> None:
    early = changed(VALID["ema"], 1, "T1E@0", before="S1U@0")
    assert any("rank 1: T1E@0 waits for S1U@0 for ever" in problem for problem in examine(early).problems)


# ---------------------------------------------------------------- any change at all


@given(
    st.sampled_from(sorted(VALID)),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 999), st.integers(0, 999)), min_size=1, max_size=4),
)
@settings(max_examples=30, deadline=None)
def test_random_swaps_are_refused_or_still_run(name: str, swaps: list[tuple[int, int, int]]) -> None:
    schedule = VALID[name]
    for rank, i, j in swaps:
        rank %= schedule.structure.num_ranks
        length = len(schedule.rows[rank])
        schedule = swapped(schedule, rank, i % length, j % length)
    assert_refused_or_runs(schedule)


@given(st.sampled_from(sorted(VALID)), st.integers(0, 999), st.integers(-3, 3))
@settings(max_examples=30, deadline=None)
def test_action_moved_in_its_row_is_refused_or_still_runs(name: str, which: int, by: int) -> None:
    schedule = VALID[name]
    everything = list(places(schedule))
    rank, i, action = everything[which % len(everything)]
    row = list(schedule.rows[rank])
    row.pop(i)
    row.insert(max(0, i + by), action)
    assert_refused_or_runs(with_row(schedule, rank, tuple(row)))


def assert_refused_or_runs(schedule: Schedule) -> None:
    if examine(schedule).problems:
        assert_refused(schedule)
        return
    n = len(schedule.structure.student_ranks)
    costs = StageCosts((1.0,) * n, (2.0,) * n, (0.5,) * n, (1.0,) * n, weight=(1.0,) * n, views=(1.0, 1.0))
    trace = simulate(schedule, costs, num_steps=5)
    done = [e.action for e in trace.events]
    assert len(done) == len(set(done))
    assert set(done) == {a for step in range(5) for a in schedule.structure.actions(step)}
    if schedule.structure.train:
        assert all(peak <= bound for peak, bound in zip(trace.stash_peak, schedule.stash, strict=True))


def test_a_refusal_crosses_processes() -> None:
    """Workers send their errors to the parent."""
    error = ScheduleError("fill", [f"rank 0: problem {i}" for i in range(25)])
    kind, arguments = error.__reduce__()
    assert kind(*arguments).problems == error.problems
    assert str(error).endswith("rank 0: problem 19\n  and 5 more")


def test_empty_rows_lack_everything() -> None:
    schedule = VALID["gpipe"]
    with pytest.raises(ScheduleError) as error:
        check(replace(schedule, rows=((), ())))
    expected = sum(len(row) for row in schedule.rows)
    assert len(error.value.problems) == expected
