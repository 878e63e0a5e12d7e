"""Loads that are level: blocks that move within a window, and unequal rows."""

from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st
from schedule.blockwise.tasks import line, profiles

from pipestill.costs import Link
from pipestill.errors import PlanError
from pipestill.plan.blockwise import balanced as module
from pipestill.plan.blockwise.balanced import balanced
from pipestill.plan.blockwise.memory import memory_bytes_of
from pipestill.plan.blockwise.plan import make_blockwise_plan
from pipestill.schedule import check
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes
from pipestill.schedule.blockwise.structure import BlockwiseCosts
from pipestill.schedule.simulate import simulate

speeds = st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0])


@pytest.fixture(autouse=True)
def few_windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Properties hold for any windows; few of them leave time for more examples."""
    if "hypothesis" in request.keywords:
        monkeypatch.setattr(module, "_WINDOWS", (2, 3))


def seconds_per_batch(costs: BlockwiseCosts, num_ranks: int) -> float:
    schedule, ranks = balanced(costs, num_ranks)
    check(schedule)
    assert schedule.structure.num_ranks == len(ranks)
    return simulate(schedule, costs.on(ranks)).seconds_per_step / schedule.structure.window


# ---------------------------------------------------------------- always


@given(st.data(), profiles(), st.integers(1, 4), st.integers(1, 40), st.booleans())
@settings(deadline=None, max_examples=15)
def test_never_slower_than_hybrid_nor_faster_than_the_limit(
    data: st.DataObject, profile: BlockProfile, devices: int, batch: int, unequal: bool
) -> None:
    pace = data.draw(st.lists(speeds, min_size=devices, max_size=devices)) if unequal else None
    hybrid, found = (
        make_blockwise_plan(profile, strategy=strategy, devices=devices, batch=batch, speeds=pace)
        for strategy in ("hybrid", "balanced")
    )
    assert found.seconds_per_batch <= hybrid.seconds_per_batch * (1 + 1e-9)
    assert found.seconds_per_batch >= found.limit_seconds_per_batch * (1 - 1e-9)


@given(st.data(), profiles(memory=True), st.integers(1, 4), st.integers(1, 40))
@settings(deadline=None, max_examples=10)
def test_memory_is_kept(data: st.DataObject, profile: BlockProfile, devices: int, batch: int) -> None:
    """What a window buffers counts."""
    costs = BlockwiseCosts(profile, batch)
    free, _ = balanced(costs, devices)
    limit = data.draw(st.integers(0, max(memory_bytes_of(free, costs))))
    if not profile.memory_known:
        return
    with suppress(PlanError):  # where not even hybrid fits
        found, _ = balanced(costs, devices, limit)
        assert max(memory_bytes_of(found, costs)) <= limit


# ---------------------------------------------------------------- by hand


def test_one_rank_does_everything() -> None:
    profile = BlockProfile((line(1.0, 2.0), line(3.0, 4.0)), Link(0.5, 10.0))
    assert seconds_per_batch(BlockwiseCosts(profile, 2), 1) == pytest.approx(20.0)
    assert seconds_per_batch(BlockwiseCosts(profile, 2, (4.0,)), 1) == pytest.approx(5.0)
    assert seconds_per_batch(BlockwiseCosts(profile, 2, (0.5,)), 1) == pytest.approx(40.0)


def test_a_block_is_cut_where_the_loads_are_level() -> None:
    """3 blocks of 4 seconds on 2 ranks: hybrid leaves 8 and 4, two batches of the middle one are 6 and 6."""
    profile = BlockProfile(tuple(BlockTimes("fixed", (1, 8), (1.0, 1.0), (3.0, 3.0), 0, 0) for _ in range(3)), Link())
    assert make_blockwise_plan(profile, strategy="hybrid", devices=2, batch=8).seconds_per_batch == pytest.approx(8.0)
    assert seconds_per_batch(BlockwiseCosts(profile, 8), 2) == pytest.approx(6.0)


def test_a_block_that_dominates_is_shared_by_rows() -> None:
    """12 seconds at 12 rows, and 2 in the others: 7 of each rank."""
    profile = BlockProfile((line(0.0, 1.0), line(0.0, 2 / 12)), Link())
    costs = BlockwiseCosts(profile, 12)
    assert seconds_per_batch(costs, 2) == pytest.approx(7.0, rel=1e-6)
    schedule, _ = balanced(BlockwiseCosts(BlockProfile((line(0.0, 1.0), line(0.0, 2 / 12)), Link(0.1)), 12), 2)
    structure = schedule.structure
    parts = {share.part for share in structure.student[0]}
    assert parts == {(Fraction(0), Fraction(7, 12)), (Fraction(7, 12), Fraction(1))}
    assert [share.rank for share in structure.student[1]] == [1] * structure.window


def test_one_block_on_several_ranks() -> None:
    assert seconds_per_batch(BlockwiseCosts(BlockProfile((line(0.0, 1.0),), Link()), 8), 4) == pytest.approx(2.0)


def test_ranks_that_only_slow_things_down_have_nothing_to_do() -> None:
    """Two blocks of fixed seconds cannot use a third rank, and an all-reduce takes long."""
    fixed = BlockTimes("fixed", (1, 8), (1.0, 1.0), (3.0, 3.0), 0, 0)
    schedule, ranks = balanced(BlockwiseCosts(BlockProfile((fixed, fixed), Link(0.5)), 8), 5)
    assert len(ranks) == schedule.structure.num_ranks < 5
    plan = make_blockwise_plan(BlockProfile((fixed, fixed), Link(0.5)), strategy="balanced", devices=5, batch=8)
    assert plan.phases[0].ranks == ranks


@pytest.mark.parametrize("teacher", [0.0, 1.0])
def test_blocks_that_take_no_time(teacher: float) -> None:
    profile = BlockProfile((line(0.0, 0.0), line(teacher, 2.0), line(0.0, 0.0), line(0.0, 2.0), line(0.0, 0.0)), Link())
    assert seconds_per_batch(BlockwiseCosts(profile, 1), 2) == pytest.approx(2.0 + teacher / 2, rel=0.05)
    nothing = BlockProfile((line(0.0, 0.0), line(0.0, 0.0)), Link())
    assert seconds_per_batch(BlockwiseCosts(nothing, 1), 2) == 0.0


def test_a_fast_rank_has_more_to_do() -> None:
    """20 seconds on ranks of 3 and 1: 5 each."""
    profile = BlockProfile(tuple(line(1.0, 3.0) for _ in range(5)), Link())
    for pace in ((3.0, 1.0), (1.0, 3.0)):
        assert seconds_per_batch(BlockwiseCosts(profile, 1, pace), 2) == pytest.approx(5.0, rel=0.02)


def test_ranks_of_different_speeds_share_rows_as_fast_as_they_are() -> None:
    """18 seconds at 18 rows, an all-reduce of 1 and nothing else, on ranks of 2 and 1: 12 and 6 rows would take 6 each, and
    then 1 each. A fast rank can do 2 seconds' work in the second that it waits.
    """
    heavy = BlockTimes("heavy", (1, 18), (0.0, 0.0), (1.0, 18.0), 0, 0, allreduce_ranks=(2,), allreduce_seconds=(1.0,))
    for pace, rows in (((2.0, 1.0), 12), ((1.0, 2.0), 6)):
        costs = BlockwiseCosts(BlockProfile((heavy,), Link()), 18, pace)
        assert seconds_per_batch(costs, 2) == pytest.approx(7.0, rel=1e-6)
        structure = balanced(costs, 2)[0].structure
        assert {share.part[1] for share in structure.student[0]} == {Fraction(rows, 18), Fraction(1)}


def test_layout_is_found_where_hybrid_does_not_fit() -> None:
    """Hybrid's ranks all hold a stage's teacher and student; a rank may also have the teacher alone, another the student."""
    block = BlockTimes("block", (1, 8), (2.0, 2.0), (2.0, 2.0), 1, 0, 1000, 1000, 1)
    profile = BlockProfile((block,), Link())
    with pytest.raises(PlanError, match="the least that any needs is"):
        make_blockwise_plan(profile, strategy="hybrid", devices=2, batch=8, memory_bytes=1500)
    plan = make_blockwise_plan(profile, strategy="balanced", devices=2, batch=8, memory_bytes=1500)
    assert max(plan.memory_bytes) <= 1500
    assert plan.seconds_per_batch == pytest.approx(2.0)
    (structure,) = (phase.schedule.structure for phase in plan.phases)
    assert {share.rank for share in structure.teacher[0]} != {share.rank for share in structure.student[0]}


def test_what_a_window_buffers_may_not_fit() -> None:
    """Without memory for a window's relays, what fits is hybrid's."""
    held = [BlockTimes("fixed", (1, 8), (1.0, 1.0), (3.0, 3.0), 100, 0, 0, 10, 0) for _ in range(3)]
    costs = BlockwiseCosts(BlockProfile(tuple(held), Link()), 8)
    free, _ = balanced(costs, 2)
    hybrid = make_blockwise_plan(costs.profile, strategy="hybrid", devices=2, batch=8)
    assert hybrid.chosen is not None
    limit = max(hybrid.chosen.memory_bytes)
    found, _ = balanced(costs, 2, limit)
    assert max(memory_bytes_of(free, costs)) > limit >= max(memory_bytes_of(found, costs))
    assert found.structure.window == 1
    refused = "fits into 0.000953674 MiB a rank: the least that any needs is .*; of layouts with level loads, [0-9.]+ MiB"
    with pytest.raises(PlanError, match=refused):
        balanced(costs, 2, 1000)
