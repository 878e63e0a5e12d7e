"""Stages of blocks on groups of ranks, against trying every candidate."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise
from math import comb
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings, strategies as st
from plan.blockwise.exhaustive import candidates, exhaustive
from plan.blockwise.tasks import line

from pipestill.costs import Link
from pipestill.errors import PlanError
from pipestill.plan.blockwise.cost_model import Stage, dp_seconds, stage_seconds
from pipestill.plan.blockwise.hybrid import Hybrid, hybrid, relay
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes

PROFILES = Path(__file__).parents[3] / "benchmarks" / "profiles"

# Whole thousandths, so that sums are often equal, and are told apart when they are not.
amounts = st.integers(0, 5000).map(lambda thousandths: thousandths / 1000)
num_bytes = st.integers(0, 20)
speeds = st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0])


@st.composite
def profiles(draw: st.DrawFn, memory: bool = False) -> BlockProfile:
    rows = tuple(draw(st.sampled_from([(8,), (1, 32), (2, 4, 16)])))

    def block(index: int) -> BlockTimes:
        seconds = [tuple(draw(amounts) for _ in rows) for _ in range(2)]
        held = [draw(num_bytes) for _ in range(3)] if memory else []
        return BlockTimes(f"block {index}", rows, *seconds, draw(num_bytes), draw(num_bytes), *held)

    link = Link(draw(st.sampled_from([0.0, 0.25])), draw(st.sampled_from([1.0, 64.0, float("inf")])))
    return BlockProfile(tuple(map(block, range(draw(st.integers(1, 8))))), link)


def valid(plan: Hybrid, num_blocks: int, ranks: list[int]) -> bool:
    """Whether the stages hold every block once, in order, on these ranks."""
    ends = [0, *(stage.end for stage in plan.stages)]
    used = [rank for stage in plan.stages for rank in stage.ranks]
    return used == ranks and [stage.first for stage in plan.stages] == ends[:-1] and ends[-1] == num_blocks


def outcome(
    search: Callable[..., Hybrid], profile: BlockProfile, batch: int, devices: int, pace: list[float], limit: int
) -> Hybrid | str:
    """The plan, or why there is none."""
    try:
        return search(profile, batch, devices, speeds=pace, memory_bytes=limit)
    except PlanError as error:
        return str(error)


# ---------------------------------------------------------------- the optimum


@given(st.data(), profiles(), st.integers(1, 6), st.integers(1, 40), st.booleans())
def test_no_candidate_is_better(data: st.DataObject, profile: BlockProfile, devices: int, batch: int, unequal: bool) -> None:
    pace = data.draw(st.lists(speeds, min_size=devices, max_size=devices)) if unequal else None
    found = hybrid(profile, batch, devices, speeds=pace)
    assert found == exhaustive(profile, batch, devices, speeds=pace)
    assert valid(found, len(profile.blocks), list(range(devices)))
    num_candidates = len(list(candidates(len(profile.blocks), devices)))
    assert num_candidates == comb(devices + len(profile.blocks) - 2, devices - 1)
    slowest = [min(pace[rank] for rank in stage.ranks) if pace else 1.0 for stage in found.stages]
    seconds = [
        stage_seconds(profile, stage.first, stage.end, len(stage.ranks), batch, speed)
        for stage, speed in zip(found.stages, slowest, strict=True)
    ]
    assert (found.seconds, list(found.stage_seconds)) == (max(seconds), seconds)


@given(st.data(), profiles(memory=True), st.integers(1, 6), st.integers(1, 40))
def test_no_candidate_that_fits_is_better(data: st.DataObject, profile: BlockProfile, devices: int, batch: int) -> None:
    pace = data.draw(st.lists(speeds, min_size=devices, max_size=devices))
    free = hybrid(profile, batch, devices, speeds=pace)
    limit = data.draw(st.integers(0, max(free.memory_bytes, default=0)))
    if not profile.memory_known:
        return
    expected, found = (outcome(search, profile, batch, devices, pace, limit) for search in (exhaustive, hybrid))
    assert found == expected
    if isinstance(found, Hybrid):
        assert max(found.memory_bytes) <= limit and found.seconds >= free.seconds * (1 - 1e-9)
    else:
        assert "the least that any needs" in found


@pytest.mark.parametrize("devices", range(1, 7))
@pytest.mark.parametrize("num_blocks", range(1, 9))
def test_every_small_size(num_blocks: int, devices: int) -> None:
    random = Random(100 * num_blocks + devices)
    blocks = tuple(line(random.random(), random.random(), held=random.randrange(1, 9)) for _ in range(num_blocks))
    profile = BlockProfile(blocks, Link(0.01, 1000.0))
    pace = [random.choice([0.5, 1.0, 2.0]) for _ in range(devices)]
    limit = max(hybrid(profile, 64, devices).memory_bytes)  # which hybrid with other speeds may not keep by itself
    assert hybrid(profile, 64, devices, speeds=pace, memory_bytes=limit) == exhaustive(
        profile, 64, devices, speeds=pace, memory_bytes=limit
    )


@given(st.data(), profiles(memory=True), st.integers(1, 10), st.integers(1, 40))
@settings(max_examples=25)
def test_no_cut_relays_better(data: st.DataObject, profile: BlockProfile, devices: int, batch: int) -> None:
    pace = data.draw(st.lists(speeds, min_size=devices, max_size=devices))
    num_blocks = len(profile.blocks)
    found = relay(profile, batch, devices, speeds=pace)
    ranks = [stage.ranks[0] for stage in found.stages]
    assert valid(found, num_blocks, sorted(ranks)) and len(ranks) == min(num_blocks, devices)
    assert sorted(pace[rank] for rank in ranks) == sorted(pace)[-len(ranks) :]
    cuts = [(0, *inner, num_blocks) for inner in combinations(range(1, num_blocks), len(ranks) - 1)]
    assert found.seconds == pytest.approx(
        min(
            max(
                stage_seconds(profile, first, end, 1, batch, pace[rank])
                for (first, end), rank in zip(pairwise(cut), ranks, strict=True)
            )
            for cut in cuts
        ),
        rel=1e-9,
    )


@pytest.mark.parametrize(
    ("name", "ratio"), [("nas-cifar", 2.25), ("nas-imagenet", 2.15), ("compress-cifar", 2.60), ("compress-imagenet", 2.18)]
)
def test_speedup_over_dp_of_the_four_tables(name: str, ratio: float) -> None:
    link = Link(latency_seconds=20e-6, bytes_per_second=10e9)
    profile = replace(BlockProfile.load(PROFILES / f"{name}.csv"), link=link)
    found = hybrid(profile, 256, 4)
    assert found == exhaustive(profile, 256, 4)
    assert round(dp_seconds(profile, 256, 4) / found.seconds, 2) == ratio


# ---------------------------------------------------------------- ties and odd sizes


@pytest.mark.parametrize(
    ("seconds", "sizes"),
    [
        ([0.7] * 5, (1, 2, 2)),  # sums of 0.7, 1.4 and 1.4 in another order
        ([0.3, 0.2, 0.1, 0.2, 0.3], (2, 3)),  # 0.1 + 0.2 + 0.3 > 0.3 + 0.2 + 0.1
    ],
)
def test_rounding_decides_no_tie(seconds: list[float], sizes: tuple[int, ...]) -> None:
    profile = BlockProfile(tuple(line(0.0, s) for s in seconds), Link())
    assert tuple(stage.end - stage.first for stage in relay(profile, 1, len(sizes)).stages) == sizes


def two_points(one_row: float, two_rows: float) -> BlockTimes:
    return BlockTimes("block", (1, 2), (0.0, 0.0), (one_row, two_rows), 0, 0)


def test_fewest_seconds_over_all_ranks() -> None:
    """The last block takes 4 seconds in any case. The first two take 2 seconds on a rank each, or 3 on both ranks; and in
    the second example 3 seconds on a rank each, or 2 on both."""
    for (one_row, two_rows), sizes in (((1.5, 2.0), (1, 1, 1)), ((1.0, 3.0), (2, 1))):
        profile = BlockProfile((*[two_points(one_row, two_rows)] * 2, two_points(4.0, 4.0)), Link())
        found = hybrid(profile, 2, 3)
        assert found == exhaustive(profile, 2, 3)
        assert (tuple(len(stage.ranks) for stage in found.stages), found.seconds) == (sizes, 4.0)


def test_a_group_counts_as_often_as_it_has_ranks() -> None:
    """With 1 second of latency, 2 + 1 ranks take 4 / 2 + 2 and 4 + 1 seconds, 1 + 2 ranks take 4 and 4 / 2 + 2 + 1."""
    found = hybrid(BlockProfile((line(0, 4.0), line(0, 4.0)), Link(1.0)), 1, 3)
    assert found.stages == (Stage(0, 1, (0, 1)), Stage(1, 2, (2,)))
    assert found.stage_seconds == (4.0, 5.0)


def test_smallest_groups_first() -> None:
    """Three ranks take 0.6 seconds each, whether a batch goes through three stages or they share every block."""
    profile = BlockProfile(tuple(line(0.1, 0.2) for _ in range(6)), Link())
    assert hybrid(profile, 1, 3).stages == (Stage(0, 2, (0,)), Stage(2, 4, (1,)), Stage(4, 6, (2,)))


def test_a_group_is_as_slow_as_its_slowest_member() -> None:
    profile = BlockProfile((line(0, 4.0), line(0, 8.0)), Link())
    assert hybrid(profile, 1, 2, speeds=[1, 2]).stage_seconds == (4.0, 4.0)
    assert hybrid(profile, 1, 2, speeds=[2, 1]).stages == (Stage(0, 2, (0, 1)),)  # 6 seconds rather than 8
    assert hybrid(profile, 1, 2, speeds=[2, 1]).seconds == 6.0
    assert relay(profile, 1, 4, speeds=[1, 3, 1, 2]).stages == (Stage(0, 1, (1,)), Stage(1, 2, (3,)))


def test_one_rank_and_more_ranks_than_blocks() -> None:
    profile = BlockProfile((line(1.0, 2.0, held=1),), Link())
    assert hybrid(profile, 6, 1).seconds == relay(profile, 6, 1).seconds == dp_seconds(profile, 6, 1) == 18.0
    found = hybrid(profile, 6, 4)  # a batch that does not divide: 2 rows at most
    assert (found.stages, found.seconds, found.memory_bytes) == ((Stage(0, 1, (0, 1, 2, 3)),), 4.5, (53,) * 4)
    assert relay(profile, 6, 3).memory_bytes == (11 + 6 * (10 + 10 + 1), 0, 0)
    assert hybrid(profile, 2, 5).stages == (Stage(0, 1, (0, 1, 2, 3, 4)),)  # fewer rows than ranks


def test_many_blocks_and_ranks_take_little_time() -> None:
    """The programme is polynomial (timeout of the test, not a measurement); there are 10^44 candidates."""
    profile = BlockProfile(tuple(line(1.0, 2.0) for _ in range(96)), Link())
    assert hybrid(profile, 1, 64).seconds == pytest.approx(4.5)


def test_memory_of_each_rank_is_that_of_its_stage() -> None:
    profile = BlockProfile((line(1, 1, held=1), line(1, 1, held=7), line(1, 1, held=2)), Link())
    assert relay(profile, 5, 3).memory_bytes == (11 + 5 * 41, 77 + 5 * 57, 22 + 5 * 32)
    assert hybrid(BlockProfile((line(1, 1),)), 5, 1).memory_bytes == ()


# ---------------------------------------------------------------- errors


def test_nothing_fits() -> None:
    blocks = BlockProfile(tuple(line(1, 1, held=2**20) for _ in range(2)))
    for search in (hybrid, exhaustive):
        with pytest.raises(
            PlanError, match=r"2 blocks on 2 devices fits into 10 MiB a rank: the least that any needs is 13.0001 MiB; use more"
        ):
            search(blocks, 2, 2, memory_bytes=10 * 2**20)
    assert hybrid(blocks, 2, 2, memory_bytes=14 * 2**20).stages == (Stage(0, 1, (0,)), Stage(1, 2, (1,)))
    with pytest.raises(PlanError, match="a limit of 10 MiB a rank for a profile that does not say what blocks hold"):
        relay(BlockProfile((line(1, 1), line(1, 1))), 2, 2, memory_bytes=10 * 2**20)


def test_all_wrong_arguments_are_told_at_once() -> None:
    profile = BlockProfile((line(1, 1),))
    for search in (hybrid, exhaustive, relay):
        with pytest.raises(
            PlanError, match="batch of 0 rows; .*; 0 devices; expected .*; 2 speeds for 0 devices; .*; a speed of -1"
        ):
            search(profile, 0, 0, speeds=[1.0, -1.0])
