"""What holds for every strategy, whatever the sizes and the costs."""

from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipestill.costs import Link, StageCosts
from pipestill.errors import PlanError
from pipestill.schedule import STRATEGIES, Action, Event, Schedule, Trace, check, generate
from pipestill.schedule.needs import needs
from pipestill.schedule.simulate import simulate, transfer_seconds

positive = st.integers(1, 9).map(float) | st.floats(1e-3, 1e3)
maybe_zero = st.just(0.0) | positive


@st.composite
def stage_costs(draw: st.DrawFn, num_stages: int, link: bool = False) -> StageCosts:
    """Very unequal at times; a teacher, a loss and an update may cost nothing."""

    def each(value: st.SearchStrategy[float]) -> tuple[float, ...]:
        shared = draw(value)
        return (shared,) * num_stages if draw(st.booleans()) else tuple(draw(value) for _ in range(num_stages))

    links = st.builds(Link, maybe_zero, positive) if link else st.just(Link())
    return StageCosts(
        forward=each(positive),
        backward=each(positive),
        update=each(maybe_zero),
        teacher=each(maybe_zero),
        loss=draw(maybe_zero),
        data=draw(maybe_zero) if link else 0.0,
        activation_bytes=(1,) * num_stages if link else (),
        teacher_bytes=(2,) * num_stages if link else (),
        link=draw(links),
        interference=draw(st.just(1.0) | st.floats(1.0, 4.0)) if link else 1.0,
    )


@st.composite
def cases(draw: st.DrawFn, link: bool = False) -> tuple[Schedule, StageCosts, int | None]:
    num_stages, num_microbatches = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    costs = draw(stage_costs(num_stages, link))
    strategy = draw(st.sampled_from(sorted(STRATEGIES)))
    run_ahead = draw(st.none() | st.integers(1, 30)) if strategy == "fill" else None
    return generate(strategy, num_stages, num_microbatches, costs=costs, run_ahead=run_ahead), costs, run_ahead


@given(cases(link=True))
@settings(max_examples=30, deadline=None)
def test_every_schedule_is_valid_and_its_trace_possible(case: tuple[Schedule, StageCosts, int | None]) -> None:
    schedule, costs, run_ahead = case
    proof = check(schedule)
    trace = simulate(schedule, costs)
    assert_every_work_once(trace, schedule)
    assert_nothing_overlaps(trace)
    assert_starts_after_its_needs(trace, schedule, costs)
    assert_within_limits(trace, schedule, costs)
    assert proof.staleness == 0
    assert all(peak <= bound for peak, bound in zip(trace.stash_peak, schedule.stash, strict=True))
    assert proof.run_ahead == schedule.run_ahead
    if run_ahead is not None:
        assert schedule.run_ahead <= run_ahead


def assert_every_work_once(trace: Trace, schedule: Schedule) -> None:
    steps = range(len(trace.steps()))
    done = [event.action for event in trace.events]
    assert trace.steps() == list(steps)
    assert len(done) == len(set(done))
    assert set(done) == {a for step in steps for a in schedule.structure.actions(step)}
    assert all(event.rank == schedule.structure.rank_of(event.action) for event in trace.events)


def assert_nothing_overlaps(trace: Trace) -> None:
    by_rank = defaultdict[int, list[Event]](list)
    for event in trace.events:
        by_rank[event.rank].append(event)
    for events in by_rank.values():
        assert all(before.end <= after.start for before, after in pairwise(events))


def assert_starts_after_its_needs(trace: Trace, schedule: Schedule, costs: StageCosts) -> None:
    """And, where a result crosses ranks, no sooner than its link allows."""
    structure = schedule.structure
    done = {event.action: event for event in trace.events}
    rounding = 1e-9 * max(event.end for event in trace.events)
    for event in trace.events:
        for need in needs(event.action, structure):
            if need.step >= 0:
                source = done[need]
                on_the_way = 0.0
                if source.rank != event.rank:
                    token = structure.serial and str(need)[0] == "T" and str(event.action)[0] == "S" and event.rank == 0
                    on_the_way = costs.link.latency_seconds if token else transfer_seconds(need, costs)
                assert event.start >= source.end + on_the_way - rounding, f"{event} needs {source}"


def assert_within_limits(trace: Trace, schedule: Schedule, costs: StageCosts) -> None:
    limit = costs.limit_seconds_per_step(schedule.structure.num_microbatches)
    assert trace.seconds_per_step >= limit * (1 - 1e-9)
    assert 0.0 <= trace.utilisation <= 1.0


@given(st.data(), st.integers(1, 6), st.integers(1, 12))
@settings(max_examples=10, deadline=None)
def test_fill_is_never_slower_than_teacher_first(data: st.DataObject, num_stages: int, num_microbatches: int) -> None:
    costs = data.draw(stage_costs(num_stages, link=True))
    first, filled = (
        simulate(generate(strategy, num_stages, num_microbatches, costs=costs), costs).seconds_per_step
        for strategy in ("1f1b", "fill")
    )
    assert filled <= first * (1 + 1e-9)


@given(st.data(), st.integers(1, 6), st.integers(1, 12), st.integers(-2, 30))
@settings(max_examples=12, deadline=None)
def test_fill_respects_run_ahead_or_says_that_it_cannot(
    data: st.DataObject, num_stages: int, num_microbatches: int, run_ahead: int
) -> None:
    costs = data.draw(stage_costs(num_stages))
    if run_ahead < 1:
        with pytest.raises(PlanError, match=f"run_ahead is {run_ahead}"):
            generate("fill", num_stages, num_microbatches, costs=costs, run_ahead=run_ahead)
    else:
        schedule = generate("fill", num_stages, num_microbatches, costs=costs, run_ahead=run_ahead)
        assert check(schedule).run_ahead <= run_ahead


@given(st.integers(1, 6), st.integers(1, 12), st.sampled_from(sorted(STRATEGIES)), st.booleans())
@settings(max_examples=20, deadline=None)
def test_generators_are_pure(num_stages: int, num_microbatches: int, strategy: str, teacher: bool) -> None:
    """Every rank derives the plan by itself: the same question has the same answer."""
    made = [generate(strategy, num_stages, num_microbatches, teacher=teacher) for _ in range(2)]
    assert made[0] == made[1]
    assert Schedule.from_text(made[0].to_text()) == made[0]


def test_work_is_the_same_in_every_strategy() -> None:
    """Strategies differ in order alone."""

    def work(strategy: str) -> list[Action]:
        rows = generate(strategy, 3, 4).rows
        return sorted({a.at(0) for row in rows for a in row if a.computes}, key=str)

    assert work("sequential") == work("gpipe") == work("1f1b") == work("fill")
