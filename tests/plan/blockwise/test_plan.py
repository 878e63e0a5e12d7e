"""Plans of blockwise training: their figures, and the four tables of acceptance."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from schedule.blockwise.tasks import line, profiles
from support.pairwise import every_other

from pipestill.costs import Link
from pipestill.errors import PlanError
from pipestill.plan.blockwise.cost_model import dp_seconds, ls
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES, BlockwisePlan, make_blockwise_plan
from pipestill.schedule import check
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes

PROFILES = Path(__file__).parents[3] / "benchmarks" / "profiles"
LINK = Link(latency_seconds=20e-6, bytes_per_second=10e9)

speeds = st.sampled_from([0.5, 1.0, 2.0])


def plans_of(profile: BlockProfile, devices: int, batch: int, *strategies: str) -> list[BlockwisePlan]:
    return [make_blockwise_plan(profile, strategy=s, devices=devices, batch=batch) for s in strategies]


# ---------------------------------------------------------------- the four tables


@pytest.mark.parametrize(
    ("name", "ratio"),
    every_other([("nas-cifar", 3.05), ("nas-imagenet", 2.3), ("compress-cifar", 3.25), ("compress-imagenet", 2.7)]),
)
def test_each_strategy_is_faster_than_the_one_before(name: str, ratio: float) -> None:
    profile = replace(BlockProfile.load(PROFILES / f"{name}.csv"), link=LINK)
    plans = plans_of(profile, 4, 256, "dp", "relay", "relay-dpu", "hybrid", "balanced")
    dp, relay, dpu, hybrid, balanced = (plan.seconds_per_batch for plan in plans)
    assert dp > relay >= dpu >= hybrid >= balanced
    assert dp / balanced >= ratio
    assert all(plan.seconds_per_batch >= plan.limit_seconds_per_batch for plan in plans)
    assert plans[3].chosen is not None
    assert 0.9 < hybrid / plans[3].chosen.seconds < 1.01  # the cost model has relays wait, the simulator overlaps them
    assert dp == pytest.approx(dp_seconds(profile, 256, 4), rel=0.05)


@pytest.mark.parametrize("name", ["nas-cifar", "nas-imagenet", "compress-cifar", "compress-imagenet"])
def test_ideal_of_the_four_tables(name: str) -> None:
    """All work once at full batches, divided by 4: 3.25, 2.76, 3.52, 3.40 (issue 4)."""
    profile = replace(BlockProfile.load(PROFILES / f"{name}.csv"), link=LINK)
    ideal = {"nas-cifar": 3.25, "nas-imagenet": 2.76, "compress-cifar": 3.52, "compress-imagenet": 3.40}[name]
    (plan,) = plans_of(profile, 4, 256, "dp")
    assert round(dp_seconds(profile, 256, 4) / plan.limit_seconds_per_batch, 2) == ideal


# ---------------------------------------------------------------- any blocks


@given(st.data(), profiles(memory=True), st.integers(1, 4), st.integers(1, 40))
@settings(deadline=None, max_examples=20)
def test_every_plan_is_proved_and_keeps_to_limits(data: st.DataObject, profile: BlockProfile, devices: int, batch: int) -> None:
    pace = data.draw(st.none() | st.lists(speeds, min_size=devices, max_size=devices))
    for strategy in sorted(BLOCKWISE_STRATEGIES.keys() - {"balanced"}):  # whose properties are tested with it
        plan = make_blockwise_plan(profile, strategy=strategy, devices=devices, batch=batch, speeds=pace)
        trained = [block for phase in plan.phases for block in phase.blocks]
        assert sorted(trained) == list(range(len(profile.blocks)))
        for phase in plan.phases:
            check(phase.schedule)
            assert phase.window == 1 and len(phase.ranks) == phase.schedule.structure.num_ranks
        assert plan.seconds_per_batch >= plan.limit_seconds_per_batch * (1 - 1e-9)
        if plan.chosen is not None and profile.memory_known:
            pairs = zip(plan.memory_bytes, plan.chosen.memory_bytes, strict=True)
            assert all(held <= predicted for held, predicted in pairs)


@given(profiles(), st.integers(1, 4), st.integers(1, 40))
@settings(deadline=None, max_examples=20)
def test_baselines_take_what_the_cost_model_says(profile: BlockProfile, devices: int, batch: int) -> None:
    dp, taken = plans_of(profile, devices, batch, "dp", "ls")
    assert dp.seconds_per_batch == pytest.approx(dp_seconds(profile, batch, devices), abs=1e-9)
    assert taken.seconds_per_batch == pytest.approx(ls(profile, batch, devices).seconds, abs=1e-9)


def test_memory_by_hand() -> None:
    """100 rows; per row, inputs of 10, 20 and 30 bytes and activations of 1, 2 and 3."""
    blocks = tuple(BlockTimes("block", (1,), (1.0,), (1.0,), 10 * i, 0, 100_000 * i, 1_000_000 * i, i) for i in range(1, 4))
    profile = BlockProfile(blocks, LINK)
    dp, dpu = plans_of(profile, 1, 100, "dp", "relay-dpu")
    # The last of dp's phases has all teachers, of whose outputs one waits for the next block, and two for the student.
    assert dp.memory_bytes == (600_000 + 3_000_000 + 100 * (30 + 30 + 3),)
    # Together, the inputs of blocks 1 and 2, the last output and the samples wait for the first student's step.
    assert dpu.memory_bytes == (600_000 + 6_000_000 + 100 * (20 + 30 + 30 + 10 + 1),)
    (dpu,) = plans_of(profile, 3, 100, "relay-dpu")
    assert dpu.memory_bytes == (
        1_100_000 + 100 * (20 + 10 + 1) + 100 * 2 * 20,
        2_200_000 + 100 * (20 + 30 + 2) + 100 * 2 * 30,
        3_300_000 + 100 * (30 + 30 + 3),
    )


def test_ranks_without_work_hold_nothing() -> None:
    blocks = tuple(BlockTimes("block", (1,), (1.0,), (1.0,), 10, 0, 5, 7, 1) for _ in range(2))
    (plan,) = plans_of(BlockProfile(blocks, LINK), 3, 10, "relay")
    assert plan.memory_bytes[2] == 0 < min(plan.memory_bytes[:2])
    assert plans_of(BlockProfile((line(1.0, 1.0),)), 2, 10, "dp")[0].memory_bytes == ()


def test_limit_knows_rows_that_are_cheaper_few_at_a_time() -> None:
    """10 seconds for 8 rows at once, 4 for 4 rows twice."""
    profile = BlockProfile((BlockTimes("block", (4, 8), (0.0, 0.0), (4.0, 10.0), 0, 0),), Link())
    hybrid, one = plans_of(profile, 2, 8, "hybrid", "relay")
    assert hybrid.seconds_per_batch == pytest.approx(4.0)
    assert hybrid.limit_seconds_per_batch <= 4.0
    assert one.seconds_per_batch == pytest.approx(10.0)


def test_baselines_that_do_not_fit_are_refused() -> None:
    blocks = tuple(BlockTimes("block", (1,), (1.0,), (1.0,), 0, 0, 2**20, 2**21, 0) for _ in range(3))
    profile = BlockProfile(blocks, LINK)
    for strategy in ("dp", "ls"):
        plan = make_blockwise_plan(profile, strategy=strategy, devices=2, batch=4, memory_bytes=5 * 2**20)
        assert max(plan.memory_bytes) == 5 * 2**20
        with pytest.raises(
            PlanError, match=rf"'{strategy}' holds 5 MiB on rank 0, more than the 4.5 MiB that it may; use a batch of fewer"
        ):
            make_blockwise_plan(profile, strategy=strategy, devices=2, batch=4, memory_bytes=4.5 * 2**20)


def test_slow_and_fast_ranks() -> None:
    profile = BlockProfile((line(1.0, 3.0), line(1.0, 7.0)), Link())
    plan = make_blockwise_plan(profile, strategy="hybrid", devices=2, batch=1, speeds=[1.0, 2.0])
    assert (plan.seconds_per_batch, plan.limit_seconds_per_batch) == (pytest.approx(4.0), pytest.approx(4.0))
    plan = make_blockwise_plan(profile, strategy="relay-dpu", devices=3, batch=1, speeds=[1.0, 0.1, 2.0])
    assert (plan.phases[0].ranks, plan.seconds_per_batch) == ((0, 2), pytest.approx(4.0))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"strategy": "hybird"}, r"no strategy 'hybird' for blocks \(did you mean 'hybrid'\?\); there are dp, ls"),
        ({"devices": 0, "batch": 0}, "a batch of 0 rows; expected at least 1; 0 devices; expected at least 1"),
        ({"speeds": [1.0]}, "1 speeds for 2 devices; expected one each"),
        ({"strategy": "dp", "speeds": [1.0]}, "1 speeds for 2 devices; expected one each"),
        ({"strategy": "dp", "speeds": [1.0, 0.0]}, "a speed of 0.0; expected more than 0"),
        ({"memory_bytes": 1.0}, "a profile that does not say what blocks hold in memory"),
        ({"strategy": "ls", "memory_bytes": 1.0}, "a profile that does not say what blocks hold in memory"),
    ],
)
def test_impossible_plans(asked: dict[str, object], message: str) -> None:
    profile = BlockProfile((line(1.0, 1.0), line(1.0, 1.0)))
    with pytest.raises(PlanError, match=message):
        make_blockwise_plan(profile, **{"strategy": "hybrid", "devices": 2, "batch": 8, **asked})  # type: ignore[arg-type]


def test_measured_allreduces_decide() -> None:
    """A heavy block and a light one on 2 ranks: shared where adding up gradients is cheap, else 10 and 2 seconds."""
    profile = BlockProfile((line(0.0, 1.0), line(0.0, 0.2)), LINK)
    for seconds, expected in ((0.5, 7.0), (5.0, 10.0)):
        measured = profile.with_allreduces((2,), [(seconds,), (seconds,)])
        dp, hybrid = plans_of(measured, 2, 10, "dp", "hybrid")
        assert hybrid.chosen is not None
        assert hybrid.chosen.seconds == pytest.approx(expected)
        assert dp.seconds_per_batch == pytest.approx(6.0 + 2 * seconds)
