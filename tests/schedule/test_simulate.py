"""The clock: hand-computed examples, to the last digit."""

from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from pipestill.costs import Link, StageCosts
from pipestill.schedule import Action, Op, PipelineStructure, Schedule, Trace, generate
from pipestill.schedule.comms import connect
from pipestill.schedule.pipeline.sequential import forward_only
from pipestill.schedule.simulate import simulate

BOTH = PipelineStructure((0, 1), (0, 1), 1)


def times(trace: Trace) -> dict[str, tuple[float, float]]:
    """When everything started and ended, but for reading the data."""
    return {str(e.action): (e.start, e.end) for e in trace.events if e.action.op is not Op.DATA}


# ---------------------------------------------------------------- work


def test_two_stages_one_microbatch() -> None:
    costs = StageCosts((1.0, 2.0), (4.0, 8.0), (16.0, 32.0), loss=0.5)
    assert times(simulate(generate("gpipe", 2, 1, teacher=False), costs, num_steps=1)) == {
        "S0F0@0": (0.0, 1.0),
        "S1F0@0": (1.0, 3.0),
        "S1L0@0": (3.0, 3.5),
        "S1B0@0": (3.5, 11.5),
        "S0B0@0": (11.5, 15.5),
        "S1U@0": (11.5, 43.5),
        "S0U@0": (15.5, 31.5),
    }


def test_next_step_reads_updated_weights() -> None:
    """Stage 0 starts the next step at its own update; stage 1 waits for its own."""
    costs = StageCosts((1.0, 2.0), (4.0, 8.0), (16.0, 32.0), loss=0.5)
    trace = times(simulate(generate("gpipe", 2, 1, teacher=False), costs, num_steps=2))
    assert trace["S0F0@1"] == (31.5, 32.5)
    assert trace["S1F0@1"] == (43.5, 45.5)


def test_teacher_first_then_the_student() -> None:
    costs = StageCosts((1.0, 1.0), (2.0, 2.0), (0.0, 0.0), teacher=(3.0, 3.0))
    trace = times(simulate(generate("1f1b", 2, 1), costs, num_steps=1))
    assert trace["T0F0@0"] == (0.0, 3.0)
    assert trace["S0F0@0"] == (3.0, 4.0)
    assert trace["T1F0@0"] == (3.0, 6.0)
    assert trace["S1F0@0"] == (6.0, 7.0)
    assert trace["S1L0@0"] == (7.0, 7.0)
    assert trace["S0B0@0"] == (9.0, 11.0)


def test_reading_data_takes_the_first_rank_time() -> None:
    costs = StageCosts((1.0,), (1.0,), (0.0,), data=5.0)
    trace = simulate(generate("gpipe", 1, 1, teacher=False), costs, num_steps=2)
    assert [(str(e.action), e.start, e.end) for e in trace.events] == [
        ("S0D@0", 0.0, 5.0),
        ("S0D@1", 5.0, 10.0),
        ("S0F0@0", 10.0, 11.0),
        ("S0L0@0", 11.0, 11.0),
        ("S0B0@0", 11.0, 12.0),
        ("S0U@0", 12.0, 12.0),
        ("S0F0@1", 12.0, 13.0),
        ("S0L0@1", 13.0, 13.0),
        ("S0B0@1", 13.0, 14.0),
        ("S0U@1", 14.0, 14.0),
    ]


def test_work_that_takes_no_time_happens_all_the_same() -> None:
    zero = StageCosts((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    schedule = generate("fill", 2, 3)
    trace = simulate(schedule, zero, num_steps=2)
    assert {e.action for e in trace.events} == {a for k in range(2) for a in schedule.structure.actions(k)}
    assert trace.seconds_per_step == trace.utilisation == 0.0


def test_validation_has_no_gradients() -> None:
    trace = times(simulate(forward_only(2, 2), StageCosts((1.0, 1.0), (9.0, 9.0), (9.0, 9.0), loss=0.5), num_steps=1))
    assert trace["S1F1@0"] == (2.5, 3.5)
    assert trace["S1L1@0"] == (3.5, 4.0)
    assert not [name for name in trace if "B" in name or "U" in name]


def test_momentum_teacher_waits_for_its_own_stage_alone() -> None:
    """Stage 1 updates for 4 s and then moves its teacher for 8; stage 0's next batch does not wait for that."""
    costs = StageCosts((1.0, 1.0), (1.0, 1.0), (2.0, 4.0), (1.0, 1.0), ema=(1.0, 8.0))
    trace = times(simulate(generate("gpipe", 2, 1, momentum=True), costs, num_steps=2))
    assert trace["S1B0@0"] == (3.0, 4.0)
    assert trace["S1U@0"] == (4.0, 8.0)
    assert trace["T1E@0"] == (8.0, 16.0)
    assert trace["S0B0@0"] == (4.0, 5.0)
    assert trace["S0U@0"] == (5.0, 7.0)
    assert trace["T0E@0"] == (7.0, 8.0)
    assert trace["T0F0@1"] == (8.0, 9.0)
    assert trace["T1F0@1"] == (16.0, 17.0)


def test_clipping_holds_every_update_until_the_last_gradient() -> None:
    costs = StageCosts((1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), link=Link(latency_seconds=0.5))
    free = times(simulate(generate("gpipe", 2, 1), costs, num_steps=1))
    clipped = times(simulate(generate("gpipe", 2, 1, clip=True), costs, num_steps=1))
    assert free["S1U@0"][0] == free["S1B0@0"][1] == 4.5
    assert clipped["S0B0@0"] == (5.0, 6.0)
    assert clipped["S0U@0"] == (6.0, 7.0)  # the other norm has long come
    assert clipped["S1U@0"] == (6.5, 7.5)  # this one takes half a second


# ---------------------------------------------------------------- links


def test_latency_and_bandwidth_shift_a_step() -> None:
    """10 bytes at 20 a second, plus half a second: one second each way."""
    link = Link(latency_seconds=0.5, bytes_per_second=20.0)
    costs = StageCosts((1.0, 1.0), (2.0, 2.0), (0.0, 0.0), activation_bytes=(10, 99), link=link)
    assert times(simulate(generate("gpipe", 2, 1, teacher=False), costs, num_steps=1)) == {
        "S0F0@0": (0.0, 1.0),
        "S1F0@0": (2.0, 3.0),
        "S1L0@0": (3.0, 3.0),
        "S1B0@0": (3.0, 5.0),
        "S1U@0": (5.0, 5.0),
        "S0B0@0": (6.0, 8.0),
        "S0U@0": (8.0, 8.0),
    }


def test_transfers_on_one_edge_share_its_bandwidth_but_not_its_latency() -> None:
    """Two messages of a second each: the second leaves when the first is through, and both are on the wire at once."""
    link = Link(latency_seconds=0.5, bytes_per_second=20.0)
    costs = StageCosts((0.25, 0.25), (1.0, 1.0), (0.0, 0.0), activation_bytes=(20, 0), link=link)
    trace = times(simulate(generate("gpipe", 2, 2, teacher=False), costs, num_steps=1))
    assert trace["S0F1@0"] == (0.25, 0.5)
    assert trace["S1F0@0"] == (1.75, 2.0)  # sent 0.25 to 1.25, arrives half a second later
    assert trace["S1F1@0"] == (2.75, 3.0)  # sent 1.25 to 2.25


def test_a_rank_that_waited_takes_time_to_wake_up() -> None:
    def seconds(strategy: str, wake: float) -> float:
        costs = StageCosts(*[(1.0, 1.0)] * 2, update=(0.0, 0.0), teacher=(1.0, 1.0), link=Link(wake_seconds=wake))
        return simulate(generate(strategy, 2, 3), costs).seconds_per_step

    # Of each microbatch, T1 waits for T0, F0 for T1, F1 for F0, B0 for B1; T0 follows B0 on its own rank.
    assert seconds("sequential", 0.25) == pytest.approx(seconds("sequential", 0.0) + 3 * 4 * 0.25)
    one = StageCosts((1.0,), (1.0,), (0.0,), (1.0,), link=Link(wake_seconds=0.25))
    assert simulate(generate("fill", 1, 3), one).seconds_per_step == pytest.approx(9.0)  # alone, nobody waits


def test_messages_keep_both_ends_from_their_work() -> None:
    """S0F0 takes rank 0 0.25 and 0.125 for its 2 bytes to send, and rank 1 as long to take; the batch's own message 0.25."""
    link = Link(0.0, 4.0, handling_seconds=0.25, handling_bytes_per_second=16.0)
    costs = StageCosts((1.0, 1.0), (1.0, 1.0), (0.0, 0.0), activation_bytes=(2, 0), link=link)
    schedule = generate("gpipe", 2, 2, teacher=False)
    trace = times(simulate(schedule, costs, num_steps=1))
    done = trace["S0F0@0"][1]
    assert trace["S0F1@0"][0] == pytest.approx(done + 0.375)
    between = 0.5 - 2 * 0.125  # what the copies leave of the way
    assert trace["S1F0@0"][0] == pytest.approx(done + 0.375 + between + 0.375 + 0.25)
    assert trace["S1F1@0"][0] == pytest.approx(trace["S1F0@0"][1] + 0.375)  # it was there, and the batch's was taken
    free = times(simulate(schedule, replace(costs, link=link.only()), num_steps=1))
    assert (free["S0F1@0"][0], free["S1F0@0"][0]) == (1.0, 1.5)


def test_opposite_directions_do_not_share() -> None:
    structure = PipelineStructure((0, 1), (1, 0), 1)
    rows = [
        tuple(map(Action.parse, text.split())) for text in ("S0F0@0 T1F0@0 S0B0@0 S0U@0", "T0F0@0 S1F0@0 S1L0@0 S1B0@0 S1U@0")
    ]
    one, link = (1.0, 1.0), Link(0.0, 10.0)
    costs = StageCosts(one, one, (0.0, 0.0), one, activation_bytes=(10, 0), teacher_bytes=(10, 0), link=link)
    trace = times(simulate(connect("crossing", structure, rows, (1, 1), run_ahead=1), costs, num_steps=1))
    assert trace["S1F0@0"] == trace["T1F0@0"] == (2.0, 3.0)


def test_work_goes_on_during_a_transfer() -> None:
    costs = StageCosts((1.0, 1.0), (1.0, 1.0), (0.0, 0.0), activation_bytes=(3, 0), link=Link(0.0, 1.0))
    trace = times(simulate(generate("gpipe", 2, 3, teacher=False), costs, num_steps=1))
    assert [trace[f"S0F{m}@0"] for m in range(3)] == [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]
    assert [trace[f"S1F{m}@0"] for m in range(3)] == [(4.0, 5.0), (7.0, 8.0), (10.0, 11.0)]


def test_a_token_carries_nothing() -> None:
    """In sequential the teacher's end is told to the student's start, and the target stays where the loss is."""
    costs = StageCosts((1.0, 1.0), (1.0, 1.0), (0.0, 0.0), (1.0, 1.0), teacher_bytes=(10, 1000), link=Link(0.25, 10.0))
    trace = times(simulate(generate("sequential", 2, 1), costs, num_steps=1))
    assert trace["T1F0@0"] == (2.25, 3.25)
    assert trace["S0F0@0"] == (3.5, 4.5)


# ---------------------------------------------------------------- interference


def test_interference() -> None:
    """Two ranks, twice as slow while both compute.

    Rank 0 alone does F0 in 2 s. Then both: rank 1 does its F0 (1 s) in 2 s, in which rank 0 does half of F1. The
    other half, alone, takes 1 s; then rank 1 does F1 alone in 1 s.
    """
    costs = StageCosts((2.0, 1.0), (0.0, 0.0), (0.0, 0.0), interference=2.0)
    trace = times(simulate(generate("gpipe", 2, 2, teacher=False), costs, num_steps=1))
    assert trace["S0F0@0"] == (0.0, 2.0)
    assert trace["S1F0@0"] == (2.0, 4.0)
    assert trace["S0F1@0"] == (2.0, 5.0)
    assert trace["S1F1@0"] == (5.0, 6.0)


def test_interference_grows_with_the_ranks_that_compute() -> None:
    """Three ranks, three times as slow while all compute, so twice while two do."""
    costs = StageCosts((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), interference=3.0)
    trace = times(simulate(generate("gpipe", 3, 3, teacher=False), costs, num_steps=1))
    assert trace["S0F0@0"] == (0.0, 1.0)
    assert trace["S0F1@0"] == trace["S1F0@0"] == (1.0, 3.0)
    assert trace["S0F2@0"] == trace["S1F1@0"] == trace["S2F0@0"] == (3.0, 6.0)
    assert trace["S1F2@0"] == trace["S2F1@0"] == (6.0, 8.0)
    assert trace["S2F2@0"] == (8.0, 9.0)


def test_interference_while_nobody_computes() -> None:
    """Symptom: division by zero where all ranks wait for messages and `interference` is the number of ranks."""
    costs = StageCosts(*[(1.0, 1.0)] * 4, link=Link(latency_seconds=1.0), interference=2.0)
    assert simulate(generate("sequential", 2, 1), costs).seconds_per_step > 0


def test_one_rank_disturbs_nobody() -> None:
    costs = StageCosts((1.0,), (1.0,), (0.0,), interference=5.0)
    assert simulate(generate("gpipe", 1, 2, teacher=False), costs).seconds_per_step == 4.0


def test_sequential_is_not_disturbed() -> None:
    """One device works at a time."""
    calm, crowded = (
        simulate(generate("sequential", 3, 2), StageCosts(*[(1.0,) * 3] * 2, (0.0,) * 3, (1.0,) * 3, interference=i))
        for i in (1.0, 3.0)
    )
    assert calm.events == crowded.events


# ---------------------------------------------------------------- runs


def test_default_run_is_long_enough_for_a_steady_state() -> None:
    for strategy in ("sequential", "gpipe", "1f1b", "fill"):
        costs = StageCosts((1.0, 2.0, 1.5), (2.0, 3.0, 2.5), (0.5, 0.5, 0.5), (1.0, 1.0, 1.5))
        schedule = generate(strategy, 3, 4, costs=costs)
        seconds = simulate(schedule, costs).step_seconds()
        assert len(seconds) >= 3
        assert seconds == pytest.approx([seconds[0]] * len(seconds))
        assert simulate(schedule, costs, num_steps=60).seconds_per_step == pytest.approx(seconds[0])


def test_a_deadlock_is_an_error_and_not_an_endless_loop() -> None:
    schedule = generate("1f1b", 2, 2)
    rows = (tuple(a for a in schedule.rows[0] if str(a) != "S0F1@0>1"), schedule.rows[1])
    broken = Schedule("broken", schedule.structure, rows, schedule.stash, schedule.run_ahead)
    with pytest.raises(RuntimeError, match=r"rank 0 never runs S0B1@0: the schedule deadlocks"):
        simulate(broken, StageCosts(*[(1.0, 1.0)] * 4))


@given(st.floats(1e-6, 1e6), st.sampled_from(["sequential", "gpipe", "1f1b"]))
@settings(max_examples=15, deadline=None)
def test_time_has_no_unit(scale: float, strategy: str) -> None:
    """Seconds or microseconds: the same picture."""

    def run(unit: float) -> Trace:
        costs = StageCosts(*[(unit, 3 * unit)] * 4, activation_bytes=(1, 1), link=Link(0.5 * unit, 2 / unit))
        return simulate(generate(strategy, 2, 3), costs)

    assert run(scale).seconds_per_step == pytest.approx(scale * run(1.0).seconds_per_step, rel=1e-9)
