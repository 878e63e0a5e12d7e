"""How good schedules have to be: docs/schedules.md and docs/filling.md, at free communication, in the steady state."""

from functools import cache
from typing import Any

import pytest
from schedule.tasks import uniform
from support.pairwise import every_other

from pipestill.schedule import Proof, Schedule, Trace, check, generate
from pipestill.schedule.simulate import simulate


@cache
def timed(strategy: str, n: int, m: int, t: float = 1.0, views: int = 1, **asked: Any) -> tuple[Trace, Schedule]:
    """f = 1 and b = 2, one of which goes to the weights."""
    costs = uniform(n, t, 1.0, 2.0, weight=1.0, views=views)
    given = {"costs": costs} if strategy == "fill" else {}
    schedule = generate(strategy, n, m, views=views, teacher_views=views, **given, **asked)
    return simulate(schedule, costs, num_steps=9 + schedule.lookahead), schedule


def run(*sizes: Any, **asked: Any) -> tuple[Trace, Proof]:
    trace, schedule = timed(*sizes, **asked)
    return trace, check(schedule)


SIZES = ((4, 8), (8, 16), (8, 8))
FILL: dict[str, tuple[dict[str, Any], str, tuple[float, float, float]]] = {
    "frozen, whole": ({}, "n", (0.9696, 0.9275, 0.711)),
    "frozen, split": ({"split_backward": True}, "2n-1", (0.999, 0.999, 0.99)),
    "exact, whole": ({"momentum": True}, "n", (0.78, 0.75, 0.60)),
    "exact, split, n": ({"momentum": True, "split_backward": True, "stash": "n"}, "n", (0.914, 0.901, 0.82)),
    "exact, split, 2n-1": ({"momentum": True, "split_backward": True, "stash": "2n-1"}, "2n-1", (0.999, 0.999, 0.82)),
    "stale, whole": ({"momentum": True, "staleness": 1}, "n", (0.955, 0.9275, 0.711)),
    "stale, split": ({"momentum": True, "staleness": 1, "split_backward": True}, "2n-1", (0.999, 0.999, 0.999)),
}


@pytest.mark.parametrize(
    "size", [pytest.param(i, id=f"n{n}-M{m}", marks=[pytest.mark.slow] if n * m > 64 else []) for i, (n, m) in enumerate(SIZES)]
)
@pytest.mark.parametrize("name", every_other(FILL))
def test_utilisation_of_fill(name: str, size: int) -> None:
    """Within the memory that each claims."""
    asked, memory, at_least = FILL[name]
    n, m = SIZES[size]
    trace, schedule = timed("fill", n, m, **asked)
    assert trace.utilisation >= at_least[size]
    assert max(trace.stash_peak) <= min({"n": n, "2n-1": 2 * n - 1}[memory], m)
    assert schedule.structure.staleness == asked.get("staleness", 0)
    if n == 4:  # proofs of larger ones take longer, and show no more
        assert check(schedule).staleness == asked.get("staleness", 0)


@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize(
    ("asked", "hop"),
    [
        ({}, 3),  # max(t, f) + b
        ({"split_backward": True, "stash": "n"}, 1),  # max(t, f) + bi - bw
    ],
)
def test_bubble_of_an_exact_momentum_teacher(asked: dict[str, Any], hop: int, n: int, m: int) -> None:
    """The work of a rank and (n - 1) hops, to the digit."""
    trace, _ = timed("fill", n, m, momentum=True, **asked)
    assert trace.seconds_per_step == pytest.approx(4 * m + (n - 1) * hop, rel=1e-9)


@pytest.mark.parametrize("n", [4, 8])
def test_tspipe_with_two_views_has_no_bubble(n: int) -> None:
    """The paper's own figure, at the paper's own M = n - 1, with every gradient and the stash of one whole batch."""
    trace, proof = run("tspipe", n, n - 1, views=2, momentum=True, batch_loss=True)
    assert trace.bubble == pytest.approx(0.0, abs=1e-9)
    assert trace.seconds_per_step == pytest.approx(8 * (n - 1), rel=1e-9)
    assert proof.staleness == 1
    assert proof.stash_peak == (4 * (n - 1),) * n  # halves of microbatches in two views


@pytest.mark.slow
def test_tspipe_at_sixteen_stages_has_no_bubble() -> None:
    trace = timed("tspipe", 16, 15, views=2, momentum=True, batch_loss=True)[0]
    assert trace.bubble == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("n", [4, 8])
def test_tspipe_with_one_view_fills_half_the_bubble(n: int) -> None:
    """Distillation from a frozen teacher: the paper says 80 % at every n."""
    trace, proof = run("tspipe", n, n - 1)
    assert 0.8 <= trace.utilisation < 0.9
    assert proof.staleness == 0


def test_fill_with_two_views_needs_no_staleness_where_the_loss_is_of_a_microbatch() -> None:
    trace, proof = run("fill", 4, 6, views=2, momentum=True, split_backward=True)
    assert trace.utilisation >= 0.999
    assert proof.staleness == 0


@pytest.mark.slow
def test_fill_with_a_long_teacher() -> None:
    """t = 4f: a greedy order blocks the student's hops and reaches 0.83."""
    trace, _ = timed("fill", 8, 16, t=4.0)
    assert trace.utilisation >= 0.97


def test_async_has_no_bubble() -> None:
    """What the ablation buys with both models' staleness."""
    trace, proof = run("async", 4, 8, momentum=True)
    assert trace.utilisation >= 0.999
    assert proof.staleness == 1
