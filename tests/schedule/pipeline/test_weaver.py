"""Insertion of flexible work into a fixed order, on one or two ranks where all work takes one second."""

from collections.abc import Iterable, Sequence

import pytest
from schedule.tasks import lists_of, texts_of, uniform

from pipestill.schedule import Action, check
from pipestill.schedule.comms import connect
from pipestill.schedule.pipeline.structure import PipelineStructure, pipeline
from pipestill.schedule.pipeline.weave import in_order, stash_bounds
from pipestill.schedule.pipeline.weaver import Bound, Weaver, _LongestPaths

SPLIT = pipeline(1, 2, teacher=False, split=True)
ORDER = lists_of("S0F0@0 S0L0@0 S0I0@0 S0F1@0 S0L1@0 S0I1@0 S0U@0")
(WEIGHTS,) = lists_of("S0W0@0 S0W1@0")


def weaver(
    structure: PipelineStructure,
    orders: Sequence[Sequence[Action]],
    flexible: Iterable[Action],
    period: float,
    bounds: Iterable[Bound] = (),
) -> Weaver:
    n = len(structure.student_ranks)
    return Weaver(structure, uniform(n, 1, 1, 2, weight=1), orders, flexible, period, bounds)


def woven(period: float, bounds: Iterable[Bound] = (), latest: bool = True) -> list[str]:
    """Both gradients of weights in the order above, the later one first."""
    made = weaver(SPLIT, ORDER, WEIGHTS, period, [*in_order(WEIGHTS), *bounds])
    assert made.feasible
    assert all(made.insert(action, 0, latest) for action in reversed(WEIGHTS))
    check(connect("woven", SPLIT, made.result(), (2,), 0))
    return texts_of(made.result())


def test_fixed_work_alone_keeps_its_period_or_not() -> None:
    """Two forwards and two gradients of inputs take four seconds."""
    assert weaver(SPLIT, ORDER, WEIGHTS, 4.0).feasible
    assert not weaver(SPLIT, ORDER, WEIGHTS, 3.9).feasible


def test_as_late_as_there_is_room() -> None:
    assert woven(6.0) == ["S0F0@0 S0L0@0 S0I0@0 S0F1@0 S0L1@0 S0I1@0 S0W0@0 S0W1@0 S0U@0"]


def test_bounds_are_kept() -> None:
    """With room for one microbatch, its gradient of weights comes before the next forward."""
    assert woven(6.0, stash_bounds(SPLIT, 0, 1)) == ["S0F0@0 S0L0@0 S0I0@0 S0W0@0 S0F1@0 S0L1@0 S0I1@0 S0W1@0 S0U@0"]


def test_most_room_keeps_every_need_too() -> None:
    for period in (6.0, 7.5):
        assert woven(period, latest=False)


def test_what_does_not_fit_is_refused() -> None:
    """A fifth second holds one of the two, and what was placed stays."""
    made = weaver(SPLIT, ORDER, WEIGHTS, 5.0, in_order(WEIGHTS))
    assert [made.insert(action, 0, latest=True) for action in reversed(WEIGHTS)] == [True, False]
    assert texts_of(made.result()) == ["S0F0@0 S0L0@0 S0I0@0 S0F1@0 S0L1@0 S0I1@0 S0W1@0 S0U@0"]


def test_longest_paths_are_brought_up_to_date() -> None:
    """A node between two adds up the edges on both sides, where that is more than the edge between them."""
    paths = _LongestPaths(3)
    assert paths.start(2, [(0, 1, 3.0), (1, 0, -5.0)]) == 0.0
    assert paths.known([(0, 1.0), (2, 1.0)]) == [(0, 1.0)]
    paths.add(2, [(0, 2.0)], [(1, 2.5)])
    assert (paths.length[0, 1], paths.length[0, 2], paths.length[2, 1]) == (4.5, 2.0, 2.5)
    assert paths.length[2, 0] == -2.5, "by way of 1"
    assert _LongestPaths(2).start(2, [(0, 1, 3.0), (1, 0, -2.0)]) > 0, "a cycle that no start times satisfy"


@pytest.mark.parametrize(
    ("staleness", "expected"), [(0, "T0F0@0 S0F0@0 S0L0@0 S0B0@0 S0U@0 T0E@0"), (1, "S0L0@0 S0B0@0 S0U@0 S0F0@1 T0F0@1 T0E@0")]
)
def test_teacher_moves_after_its_last_forward_and_the_update(staleness: int, expected: str) -> None:
    """The one forward stands right before the loss where it may be late. One that is a version behind then ends a step
    that is under way, so the row is turned; the exact one stands in the next period of the fixed order.
    """
    structure = pipeline(1, 1, momentum=True, staleness=staleness)
    (forward,) = lists_of("T0F0@0")[0]
    update = Action.parse("S0U@0")
    made = weaver(structure, lists_of("S0F0@0 S0L0@0 S0B0@0 S0U@0"), [forward], 4.0, [(update, forward, 1 + staleness)])
    assert made.insert(forward, 1 + staleness, latest=True)
    rows = made.result()
    proof = check(connect("woven", structure, rows, (1,), 9))
    assert proof.staleness == staleness
    (row,) = rows
    assert {str(a.at(0)) for a in row} == {str(a.at(0)) for a in lists_of(expected)[0]}
    assert str(row[-1]) == "T0E@0"


def test_start_times_keep_the_period() -> None:
    made = weaver(SPLIT, ORDER, WEIGHTS, 6.0, in_order(WEIGHTS))
    assert all(made.insert(action, 0, latest=True) for action in reversed(WEIGHTS))
    (timed,) = made.timed()
    assert [(str(action), start - timed[0][0]) for start, action in timed] == [
        ("S0F0@0", 0.0),
        ("S0L0@0", 1.0),
        ("S0I0@0", 1.0),
        ("S0F1@0", 2.0),
        ("S0L1@0", 3.0),
        ("S0I1@0", 3.0),
        ("S0W0@0", 4.0),
        ("S0W1@0", 5.0),
        ("S0U@0", 6.0),
    ]


def test_needs_across_ranks() -> None:
    """One microbatch on two ranks: F0 on each, then I1, I0, so a period of 4 leaves rank 1 one second after its own I."""
    structure = pipeline(2, 1, teacher=False, split=True)
    orders = lists_of("S0F0@0 S0I0@0 S0U@0", "S1F0@0 S1L0@0 S1I0@0 S1U@0")
    weights = [row[0] for row in lists_of("S0W0@0", "S1W0@0")]
    assert not weaver(structure, orders, weights, 3.9).feasible
    made = weaver(structure, orders, weights, 4.0)
    assert made.feasible
    assert made.insert(weights[1], 0, latest=True)
    assert not made.insert(weights[0], 0, latest=True)
    longer = weaver(structure, orders, weights, 5.0)
    assert longer.insert(weights[1], 0, latest=True)
    assert longer.insert(weights[0], 0, latest=True)
    assert texts_of(longer.result()) == ["S0F0@0 S0I0@0 S0W0@0 S0U@0", "S1F0@0 S1L0@0 S1I0@0 S1W0@0 S1U@0"]
