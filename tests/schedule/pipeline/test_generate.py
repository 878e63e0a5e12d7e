"""The drawn tables, the closed forms and the knobs of every strategy."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from schedule.pipeline.tables import drawn, timed, work
from schedule.tasks import uniform

from pipestill.errors import PlanError
from pipestill.schedule import PIPELINE_STRATEGIES, Role, check, generate
from pipestill.schedule.pipeline import gpipe as gpipe_module, one_f_one_b as one_f_one_b_module, sequential as sequential_module
from pipestill.schedule.simulate import simulate

# ---------------------------------------------------------------- the drawn tables


@pytest.mark.parametrize(
    ("module", "strategy", "num_stages", "num_microbatches"),
    [(sequential_module, "sequential", 2, 2), (gpipe_module, "gpipe", 2, 2), (one_f_one_b_module, "1f1b", 2, 3)],
)
def test_drawn_table(module: ModuleType, strategy: str, num_stages: int, num_microbatches: int) -> None:
    """Both what every rank does in which order, and when."""
    schedule = generate(strategy, num_stages, num_microbatches)
    table = drawn(module)
    assert [work(row) for row in schedule.rows] == [[w for w in row if w != ".."] for row in table]
    assert timed(schedule, num_stages, step=0) == table


# ---------------------------------------------------------------- tables by hand


# ---------------------------------------------------------------- closed forms

sizes = st.integers(1, 5), st.integers(1, 10)
seconds = st.floats(0.1, 10.0)


@pytest.mark.parametrize("strategy", ["gpipe", "1f1b", "fill"])
@given(*sizes, seconds, seconds)
@settings(max_examples=12, deadline=None)
def test_bubble_of_the_student_alone(strategy: str, n: int, m: int, f: float, b: float) -> None:
    """(n-1) / (M+n-1): GPipe, Huang et al. 2019, section 2.3; the same for 1F1B, Narayanan et al. 2021, section 2.2."""
    costs = uniform(n, 0.0, f, b)
    trace = simulate(generate(strategy, n, m, teacher=False, costs=costs), costs)
    assert trace.bubble == pytest.approx((n - 1) / (m + n - 1), abs=1e-9)


@pytest.mark.parametrize("strategy", ["gpipe", "1f1b"])
@given(*sizes, st.floats(0.0, 1.0), seconds, seconds)
@settings(max_examples=12, deadline=None)
def test_bubble_of_teacher_first(strategy: str, n: int, m: int, share: float, f: float, b: float) -> None:
    """While a teacher forward is no longer than the student's, the student never waits for it on later ranks."""
    t = share * f
    costs = uniform(n, t, f, b)
    trace = simulate(generate(strategy, n, m), costs)
    step = m * t + (m + n - 1) * (f + b)
    assert trace.seconds_per_step == pytest.approx(step, rel=1e-9)
    assert trace.bubble == pytest.approx(1 - m * (t + f + b) / step, abs=1e-9)


@pytest.mark.parametrize("strategy", ["gpipe", "1f1b"])
@given(*sizes, st.floats(1.0, 5.0), seconds, seconds)
@settings(max_examples=12, deadline=None)
def test_step_of_teacher_first_with_a_longer_teacher(strategy: str, n: int, m: int, times: float, f: float, b: float) -> None:
    """A teacher that is slower than the student's forward keeps the last rank waiting by (n-1)(t-f)."""
    t = times * f
    trace = simulate(generate(strategy, n, m), uniform(n, t, f, b))
    assert trace.seconds_per_step == pytest.approx(m * t + (m + n - 1) * (f + b) + (n - 1) * (t - f), rel=1e-9)


@pytest.mark.parametrize("batch_loss", [False, True])
@pytest.mark.parametrize("strategy", ["gpipe", "1f1b"])
@given(*sizes, st.floats(0.0, 1.0), seconds, seconds, seconds)
@settings(max_examples=8, deadline=None)
def test_step_of_teacher_first_with_momentum(
    strategy: str, batch_loss: bool, n: int, m: int, share: float, f: float, b: float, end: float
) -> None:
    """Moving the teacher costs its own time and nothing else, in any number of views, clipped or not.

    Rank 0 is the last to update and the first to start, so neither the barrier of the norm nor anyone else's update
    is waited for; every unit of every view is one more microbatch.
    """
    m = min(m, 5)
    costs = replace(uniform(n, share * f, f, b, views=2), update=(end,) * n, ema=(end / 2,) * n)
    work: dict[str, Any] = {"momentum": True, "views": 2, "teacher_views": 2, "batch_loss": batch_loss, "clip": True}
    trace = simulate(generate(strategy, n, m, **work), costs)
    step = 2 * m * share * f + (2 * m + n - 1) * (f + b) + 1.5 * end
    assert trace.seconds_per_step == pytest.approx(step, rel=1e-9)
    assert trace.bubble == pytest.approx(1 - (2 * m * (share * f + f + b) + 1.5 * end) / step, abs=1e-9)


@pytest.mark.parametrize("strategy", ["gpipe", "1f1b", "fill"])
@given(*sizes, st.floats(0.1, 1.0), seconds, seconds)
@settings(max_examples=8, deadline=None)
def test_step_of_an_exact_momentum_teacher(strategy: str, n: int, m: int, share: float, f: float, b: float) -> None:
    """M (t + f + b) + (n - 1) (max(t, f) + b) for whole backwards (docs/filling.md). Teacher first is as good as any."""
    t, m = share * f, min(m, 6)
    costs = uniform(n, t, f, b)
    trace = simulate(generate(strategy, n, m, momentum=True, costs=costs), costs)
    assert trace.seconds_per_step == pytest.approx(m * (t + f + b) + (n - 1) * (f + b), rel=1e-9)


@pytest.mark.parametrize("strategy", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("n", "m", "utilisation"), [(4, 8, 0.780), (8, 16, 0.753), (8, 8, 0.604)])
def test_teacher_first_figures(strategy: str, n: int, m: int, utilisation: float) -> None:
    """The figures of teacher first, which another simulator computed too."""
    assert simulate(generate(strategy, n, m), uniform(n, 1, 1, 2)).utilisation == pytest.approx(utilisation, abs=6e-4)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (4, 2), (4, 8)])
def test_declared_memory(n: int, m: int) -> None:
    assert generate("sequential", n, m).stash == (1,) * n
    assert generate("gpipe", n, m).stash == (m,) * n
    for strategy in ("1f1b", "fill"):
        assert generate(strategy, n, m).stash == tuple(min(n - stage, m) for stage in range(n))
    for strategy in ("gpipe", "1f1b", "fill", "tspipe"):  # a loss over the batch needs all of it at once
        halves = 2 if strategy == "tspipe" else 1
        assert generate(strategy, n, m, batch_loss=True).stash == (halves * m,) * n
    assert generate("sequential", n, m).run_ahead == 1
    assert generate("gpipe", n, m).run_ahead == generate("1f1b", n, m).run_ahead == m


# ---------------------------------------------------------------- knobs and names


@pytest.mark.parametrize("strategy", PIPELINE_STRATEGIES)
def test_every_strategy_has_one_line_about_it(strategy: str) -> None:
    assert PIPELINE_STRATEGIES[strategy]
    assert "\n" not in PIPELINE_STRATEGIES[strategy]
    assert generate(strategy, 2, 2, momentum=True).strategy == strategy


@pytest.mark.parametrize("strategy", ["sequential", "gpipe", "1f1b", "fill"])
def test_without_a_teacher(strategy: str) -> None:
    schedule = generate(strategy, 3, 4, teacher=False)
    assert check(schedule).run_ahead == 0
    assert {a.role for row in schedule.rows for a in row} == {Role.STUDENT}


@pytest.mark.parametrize(
    ("strategy", "n", "m", "message"),
    [
        ("1f1b", 0, 4, "0 stages; expected at least 1"),
        ("fill", 2, 0, "0 microbatches; expected at least 1"),
        ("filll", 2, 2, r"no strategy 'filll' \(did you mean 'fill'\?\); there are sequential, gpipe, 1f1b, tspipe, async, fill"),
        ("zebra", 2, 2, "no strategy 'zebra'; there are"),
    ],
)
def test_what_cannot_be_generated(strategy: str, n: int, m: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        generate(strategy, n, m)


@pytest.mark.parametrize("knob", [{"run_ahead": 2}, {"split_backward": True}, {"stash": "n"}, {"staleness": 0}])
@pytest.mark.parametrize("strategy", ["sequential", "gpipe", "1f1b", "tspipe", "async"])
def test_knobs_belong_to_fill(strategy: str, knob: dict[str, Any]) -> None:
    (name,) = knob
    with pytest.raises(PlanError, match=f"{name} is a knob of 'fill'; strategy '{strategy}' has none"):
        generate(strategy, 2, 2, momentum=True, **knob)


@pytest.mark.parametrize(
    ("strategy", "asked", "message"),
    [
        ("tspipe", {"teacher": False}, "'tspipe' fills a student's bubbles .* this task has none; use '1f1b'"),
        ("async", {"teacher": False}, "'async' is an ablation of momentum teachers; use 'fill', which is exact"),
        ("async", {}, "'async' is an ablation of momentum teachers; use 'fill', which is exact"),
        ("fill", {"staleness": 1}, "staleness is of a momentum teacher; a frozen one has no versions; leave it out"),
        ("fill", {"staleness": 2, "momentum": True}, "staleness is 2; expected 0 or 1"),
        ("fill", {"staleness": -1, "momentum": True}, "staleness is -1; expected 0 or 1"),
        ("fill", {"stash": "most"}, "stash is 'most'; expected a number of microbatches, or n, 2n-1 or all"),
        ("fill", {"stash": 2}, r"stash is 2 microbatches; .* at least 3 for its 3 stages \(--stash n\)"),
        ("fill", {"stash": 0}, "stash is 0 microbatches; .* at least 3 for its 3 stages"),
        ("fill", {"stash": 3, "batch_loss": True}, "stash is 3 microbatches; .* at least 4 for its whole batch"),
        ("fill", {"stash": 1, "views": 2}, "stash is 1 microbatches; .* at least 2 for its 3 stages"),
    ],
)
def test_what_a_task_does_not_have(strategy: str, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        generate(strategy, 3, 4, **asked)
