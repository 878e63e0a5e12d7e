"""Fill: its tables, the limits that it reaches, its knobs, and costs that once broke it."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from schedule.pipeline.tables import drawn, timed, work
from schedule.tasks import uniform, work_of

from pipestill.costs import Link, StageCosts
from pipestill.errors import PlanError
from pipestill.schedule import PipelineStructure, check, generate
from pipestill.schedule.pipeline import fill as fill_module
from pipestill.schedule.pipeline.fill import stash_units
from pipestill.schedule.simulate import simulate


def test_drawn_table_of_fill() -> None:
    """A steady step: a teacher's forward for the next step stands where the student would idle."""
    equal = StageCosts(*[(1.0,) * 3] * 4)
    schedule = generate("fill", 3, 4, costs=equal)
    table = drawn(fill_module)
    assert timed(schedule, 3, step=6) == table
    for row, words in zip(schedule.rows, table, strict=True):
        endless = " ".join(w.upper() for w in words * 2)  # a period may be cut elsewhere than a picture
        assert " ".join(w.upper() for w in work(row)) in endless


def test_fill_of_a_momentum_teacher() -> None:
    """Exact: no teacher forward is of another step. Rank 1's backward of microbatch 0 comes before its T1."""
    assert work_of(generate("fill", 2, 2, momentum=True)) == [
        "T0F0@0 S0F0@0 T0F1@0 S0F1@0 S0B0@0 S0B1@0 S0U@0 T0E@0",
        "T1F0@0 S1F0@0 S1L0@0 S1B0@0 T1F1@0 S1F1@0 S1L1@0 S1B1@0 S1U@0 T1E@0",
    ]


def test_fill_of_a_momentum_teacher_and_split_backwards() -> None:
    """Rank 1 puts its gradients of weights off until rank 0 has all that it waits for."""
    assert work_of(generate("fill", 2, 2, momentum=True, split_backward=True)) == [
        "T0F0@0 S0F0@0 T0F1@0 S0F1@0 S0I0@0 S0W0@0 S0I1@0 S0W1@0 S0U@0 T0E@0",
        "T1F0@0 S1F0@0 S1L0@0 S1I0@0 T1F1@0 S1F1@0 S1L1@0 S1I1@0 S1W0@0 S1W1@0 S1U@0 T1E@0",
    ]


def test_fill_of_a_stale_momentum_teacher() -> None:
    """Rank 0's teacher is one batch ahead in the bubble of 1F1B, and moves afterwards."""
    assert work_of(generate("fill", 2, 2, momentum=True, staleness=1)) == [
        "S0F0@0 S0F1@0 T0F0@1 T0F1@1 S0B0@0 S0B1@0 S0U@0 T0E@0",
        "S1F0@0 S1L0@0 S1B0@0 S1F1@0 S1L1@0 S1B1@0 S1U@0 T1F0@1 T1F1@1 T1E@0",
    ]


@given(st.integers(1, 4), st.integers(1, 8), st.sampled_from([1.0, 2.0, 3.0]))
@settings(max_examples=8, deadline=None)
def test_fill_reaches_the_limit_of_equal_stages(n: int, m: int, b: float) -> None:
    """Nothing but the work of a rank, or the student's own path, bounds a step (docs/schedules.md).

    Where a teacher's forwards do not divide the gaps evenly, a step takes a little longer.
    """
    costs = uniform(n, 1.0, 1.0, b)
    limit = max(m * (2 + b), (m + n - 1) * (1 + b))
    assert simulate(generate("fill", n, m, costs=costs), costs).seconds_per_step == pytest.approx(limit, rel=1e-9)


def test_fill_where_a_student_alone_idles() -> None:
    """The project's figures for a frozen teacher at t = f = 1, b = 2."""
    utilisation = simulate(generate("fill", 4, 8), uniform(4, 1, 1, 2)).utilisation
    assert utilisation == pytest.approx(32 / 33, rel=1e-9)
    assert round(utilisation, 3) == 0.970


@pytest.mark.slow
def test_fill_at_sixteen_stages() -> None:
    costs = uniform(16, 1, 1, 2)
    schedule = generate("fill", 16, 16, costs=costs)
    check(schedule)
    assert simulate(schedule, costs).seconds_per_step == pytest.approx((16 + 16 - 1) * 3)


@pytest.mark.parametrize("run_ahead", [1, 4])
def test_fill_keeps_to_run_ahead(run_ahead: int) -> None:
    schedule = generate("fill", 3, 6, run_ahead=run_ahead)
    assert check(schedule).run_ahead == schedule.run_ahead <= run_ahead


def test_more_memory_is_never_slower() -> None:
    costs = uniform(3, 1, 1, 2)
    made = [generate("fill", 3, 6, costs=costs, run_ahead=ahead) for ahead in (1, 12)]
    steps = [simulate(schedule, costs).seconds_per_step for schedule in made]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == pytest.approx(24)  # of which every rank works all


@pytest.mark.parametrize("run_ahead", [0, -1])
def test_fill_without_room_for_a_teacher_output(run_ahead: int) -> None:
    with pytest.raises(PlanError, match=f"run_ahead is {run_ahead}; the teacher has to be at least 1 ahead"):
        generate("fill", 4, 8, run_ahead=run_ahead)


@pytest.mark.parametrize(
    ("fields", "units"),
    [
        ({}, {"n": 4, "2n-1": 7, "all": 8, None: 4, 4: 4, 5: 5, 99: 8}),
        ({"split": True}, {None: 7, "n": 4}),
        ({"views": 2}, {"n": 5, "2n-1": 8, "all": 16, None: 5, 3: 6, 99: 16}),
        ({"batch_loss": True}, {"n": 8, "2n-1": 8, "all": 8, 8: 8}),
        ({"num_microbatches": 3}, {"n": 3, "2n-1": 3, "all": 3, 3: 3}),
    ],
)
def test_what_stash_means(fields: dict[str, Any], units: dict[str | int | None, int]) -> None:
    """In units that the first of four ranks holds: a microbatch in one view each."""
    structure = replace(PipelineStructure(tuple(range(4)), (), 8), **fields)
    assert {stash: stash_units(stash, structure) for stash in units} == units


def test_stash_bounds_what_is_held() -> None:
    """More memory is no slower, and where it is the limit it is used."""
    costs = uniform(3, 1, 1, 2, weight=1)
    steps = []
    for stash in (3, 4, 5):
        schedule = generate("fill", 3, 6, costs=costs, momentum=True, split_backward=True, stash=stash)
        assert max(check(schedule).stash_peak) == max(schedule.stash) == stash
        steps.append(simulate(schedule, costs).seconds_per_step)
    assert steps == sorted(steps, reverse=True)
    assert (steps[0], steps[-1]) == (pytest.approx(26.0), pytest.approx(24.0))


def test_costs_of_another_number_of_stages() -> None:
    with pytest.raises(PlanError, match="costs are of 2 student and 2 teacher stages, the schedule has 3"):
        generate("fill", 3, 4, costs=uniform(2, 1, 1, 1))
    with pytest.raises(PlanError, match="costs are of 2 student and 0 teacher stages, the schedule has 2"):
        generate("fill", 2, 4, costs=StageCosts((1.0, 1.0), (1.0, 1.0), (0.0, 0.0)))


def test_fill_with_links_too_slow_to_pack_for() -> None:
    """Symptom: with a latency of a million periods the search for a shift did not end."""
    costs = StageCosts(*[(1e-6,) * 2] * 4, teacher_bytes=(1, 1), link=Link(latency_seconds=2.0))
    check(generate("fill", 2, 2, costs=costs))


def test_fill_of_work_that_takes_no_time() -> None:
    """Symptom: with all costs 0 the teacher was placed after the loss that needs it."""
    for n in (1, 3):
        check(generate("fill", n, 4, costs=StageCosts(*[(0.0,) * n] * 4)))


def test_fill_where_ranks_run_a_step_apart() -> None:
    """Symptom: teacher work after an update met the next batch's announcement and got stuck under rendezvous sends."""
    costs = StageCosts(
        forward=(0.0, 0.0, 0.0), backward=(0.0, 2.7, 0.0), update=(1.6, 4.0, 2.0), teacher=(0.001, 0.6, 2.1), loss=0.3
    )
    check(generate("fill", 3, 5, costs=costs))


def test_fill_of_weight_gradients_that_take_no_time() -> None:
    """Symptom: split backwards under costs that do not tell them apart ended in an internal error."""
    costs = replace(uniform(2, 1, 1, 1), ema=(5.0, 5.0), link=Link(latency_seconds=1.0))
    check(generate("fill", 2, 1, costs=costs, momentum=True, split_backward=True))


def test_fill_without_a_teacher_ignores_run_ahead() -> None:
    """Nothing is ahead; a bound below zero once sent the search after forwards that no row holds."""
    costs = uniform(1, 1.0, 1.0, 9.0)
    made = [generate("fill", 1, 1, teacher=False, costs=costs, run_ahead=bound) for bound in (None, -1)]
    assert made[0] == made[1]


def test_fill_with_unequal_stages_is_not_slower_than_teacher_first() -> None:
    """A goal that theory gives for equal stages ended the search above what plain 1F1B reaches."""
    costs = StageCosts(
        forward=(6.0, 8.0), backward=(1.0, 1.0), update=(0.0, 0.0), teacher=(0.0, 1.0), activation_bytes=(1, 1),
        teacher_bytes=(2, 2), link=Link(0.0, 1.0), weight=(0.25, 0.25), ema=(0.0, 0.0), views=(1.0,),
    )  # fmt: skip
    filled = generate("fill", 2, 3, momentum=True, costs=costs)
    assert simulate(filled, costs).seconds_per_step <= simulate(generate("1f1b", 2, 3, momentum=True), costs).seconds_per_step * (
        1 + 1e-9
    )
