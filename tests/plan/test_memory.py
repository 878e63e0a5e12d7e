"""What each rank of a pipeline holds, worked out by hand; and plans that keep a limit of it."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest

from pipestill.costs import BlockCosts, Costs
from pipestill.errors import PlanError
from pipestill.plan import Plan, make_plan
from pipestill.plan.search import search_pipelines
from pipestill.schedule.pipeline.structure import Demands

STUDENT = BlockCosts("s", 1.0, 2.0, parameter_bytes=100, training_bytes=200, stash_bytes=10, output_bytes=3, weight_seconds=1.0)
TEACHER = BlockCosts("t", 1.0, parameter_bytes=50, output_bytes=4)
WEIGHTS, UNIT, OUTPUT = 300, 13, 3


def plan(strategy: str, devices: int, microbatches: int, teacher: bool = True) -> Plan:
    costs = Costs((STUDENT,) * devices, (TEACHER,) * devices if teacher else ())
    return make_plan(costs, devices=devices, strategy=strategy, microbatches=microbatches)


def test_one_rank_holds_weights_targets_and_what_backwards_need() -> None:
    """Both teacher outputs wait for their losses while the first microbatch is between forward and backward."""
    assert plan("1f1b", 1, 2).memory_bytes == (WEIGHTS + 50 + 2 * 4 + UNIT,)


def test_all_forwards_first_hold_all_microbatches() -> None:
    """Rank 0 keeps four, and receives of two gradients are posted early; rank 1 keeps what arrived as well. Both hold on to
    the last 32 values that they sent, four of which rank 0 counts among its units.
    """
    held = plan("gpipe", 2, 4, teacher=False).memory_bytes
    assert held == (WEIGHTS + 4 * UNIT + (2 + 28) * OUTPUT, WEIGHTS + 4 * (UNIT + OUTPUT) + 32 * OUTPUT)


def test_forwards_and_backwards_in_turn_hold_as_many_as_there_are_stages_left() -> None:
    first, last = plan("1f1b", 2, 4, teacher=False).memory_bytes
    assert first == WEIGHTS + 2 * UNIT + (2 + 30) * OUTPUT
    assert last == WEIGHTS + UNIT + (2 + 32) * OUTPUT


@pytest.mark.parametrize("strategy", ["sequential", "gpipe", "1f1b", "tspipe", "fill"])
@pytest.mark.parametrize("devices", [1, 3])
def test_no_rank_holds_less_than_its_stash_and_weights(strategy: str, devices: int) -> None:
    one = plan(strategy, devices, 6)
    for held, stash in zip(one.memory_bytes, one.proof.stash_peak, strict=True):
        units = stash / one.schedule.structure.pieces  # TSPipe's backward takes halves of a microbatch
        assert held >= WEIGHTS + 50 + int(units * 10)
        assert held <= WEIGHTS + 50 + (units + 1) * (UNIT + 2 * OUTPUT) + 2 * 6 * 4 + 32 * 4


def test_views_of_other_sizes_count_as_they_are() -> None:
    costs = Costs((STUDENT,), (TEACHER,), views=(1.5, 0.5))
    demands = Demands(momentum=True, views=2, teacher_views=2, batch_loss=True)
    one = make_plan(costs, devices=1, strategy="1f1b", microbatches=2, demands=demands)
    assert one.memory_bytes == (WEIGHTS + 50 + 2 * (int(1.5 * 10) + 4 + int(0.5 * 10) + 1) + 2 * (6 + 2),)


def test_costs_without_bytes_tell_nothing() -> None:
    costs = Costs.uniform(2, 1, 1, 2)
    make = partial(make_plan, costs, devices=2, strategy="fill", microbatches=2)
    assert make().memory_bytes == ()
    with pytest.raises(PlanError, match="do not tell what blocks hold in memory"):
        make(memory_bytes=10**12)


def test_a_plan_keeps_its_limit_or_is_refused() -> None:
    costs = Costs((STUDENT,) * 2, (TEACHER,) * 2)
    make = partial(make_plan, costs, devices=2, strategy="1f1b", microbatches=2)
    most = max(make().memory_bytes)
    assert make(memory_bytes=most) == make()
    with pytest.raises(PlanError, match=r"rank 0 would hold .* MiB, more than the .* MiB of --memory"):
        make(memory_bytes=most - 1)


def test_the_chosen_plan_keeps_the_limit() -> None:
    costs = Costs((dataclasses.replace(STUDENT, stash_bytes=1000),) * 2, (TEACHER,) * 2)
    search = partial(search_pipelines, costs, Demands(), devices=2, microbatches=3, strategy="fill")
    sizes = sorted({max(one.plan.memory_bytes) for one in search().considered if one.plan is not None})
    limit = sizes[-1] - 1
    tight = search(memory_bytes=limit)
    assert max(tight.plan.memory_bytes) <= limit
    refused = [one.refused for one in tight.considered if one.plan is None]
    assert refused and all("would hold" in reason and "--memory" in reason for reason in refused)
    with pytest.raises(PlanError, match=r"rank \d would hold .* MiB, more than the .* MiB of --memory"):
        search(memory_bytes=100)


def test_another_cut_is_taken_where_it_is_faster() -> None:
    """A teacher first hides nothing of the student's path; where it does, cuts that weigh the path less are faster."""
    sizes = (2, 1, 3, 1, 4, 4, 4)
    student = [BlockCosts(f"s{i}", f, 2 * f, weight_seconds=f) for i, f in enumerate(sizes)]
    costs = Costs(tuple(student), tuple(BlockCosts(f"t{i}", 4) for i in range(7)))
    found = search_pipelines(costs, Demands(), devices=2, microbatches=2, strategy="tspipe")
    plain = make_plan(costs, devices=2, strategy="tspipe", microbatches=2)
    assert found.plan.prediction.seconds_per_step < plain.prediction.seconds_per_step
    assert found.plan.student_partition != plain.student_partition or found.plan.teacher_partition != plain.teacher_partition
    assert [one for one in found.considered if one is found.chosen], "the table shows what was chosen"


def test_costs_of_earlier_versions_are_read() -> None:
    data = Costs((STUDENT,), (TEACHER,), source="measured").to_json()
    assert Costs.from_json(data).student[0] == STUDENT
    del data["source"]
    for block in (*data["student"], *data["teacher"]):
        del block["training_bytes"], block["stash_bytes"]
    old = Costs.from_json(data)
    assert not old.know_memory and old.source == "" and old.student[0].training_bytes == 0


def test_features_wait_for_their_loss_and_their_backward() -> None:
    """The teacher's value waits for the loss, and the gradient of the student's then waits for the backward."""
    costs = Costs((STUDENT,), (TEACHER,))
    without, compared = (
        make_plan(costs, devices=1, strategy="sequential", microbatches=2, demands=Demands(features=features)).memory_bytes
        for features in ((), ((0, 0),))
    )
    assert compared == (without[0] + 4 + OUTPUT,), "while the loss runs, both are there"
