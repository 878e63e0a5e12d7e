"""The drawn tables, the closed forms and the knobs of every strategy."""

import re
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule.tasks import uniform, word, work_of

from pipestill.costs import Link, StageCosts
from pipestill.errors import PlanError
from pipestill.schedule import PIPELINE_STRATEGIES, Action, Op, PipelineStructure, Role, Schedule, check, generate
from pipestill.schedule.pipeline import fill as fill_module
from pipestill.schedule.pipeline import gpipe as gpipe_module
from pipestill.schedule.pipeline import one_f_one_b as one_f_one_b_module
from pipestill.schedule.pipeline import sequential as sequential_module
from pipestill.schedule.pipeline import tspipe as tspipe_module
from pipestill.schedule.pipeline.fill import stash_units
from pipestill.schedule.pipeline.sequential import forward_only
from pipestill.schedule.simulate import simulate


def seconds_per_step(strategy: str, num_stages: int, num_microbatches: int, costs: StageCosts) -> float:
    return simulate(generate(strategy, num_stages, num_microbatches, costs=costs), costs).seconds_per_step


# ---------------------------------------------------------------- the drawn tables


def drawn(module: ModuleType) -> list[list[str]]:
    """The table of the module's docstring: what each rank does, one word a unit of time."""
    lines = re.findall(r"^ *rank \d+   (.*?)(?:  +\(.*)?$", str(module.__doc__), flags=re.MULTILINE)
    return [line.split() for line in lines]


def timed(schedule: Schedule, num_ranks: int, step: int) -> list[list[str]]:
    """One step as a table, where all work takes one unit of time."""
    equal = StageCosts(*[(1.0,) * num_ranks] * 4)
    trace = simulate(schedule, equal)
    ends = [0.0] * len(trace.steps())
    for event in trace.events:
        if event.action.op is Op.UPDATE:
            ends[event.action.step] = max(event.end, ends[event.action.step])
    first, last = ends[step - 1] if step else 0.0, ends[step]
    table = [[".."] * round(last - first) for _ in range(num_ranks)]
    for event in trace.events:
        if event.seconds > 0 and first <= event.start < last:
            table[event.rank][round(event.start - first)] = word(event.action, step)
    return [strip(row) for row in table]


def strip(row: list[str]) -> list[str]:
    while row[-1] == "..":
        row.pop()
    return row


def work(row: tuple[Action, ...]) -> list[str]:
    return [word(a, 0) for a in row if a.computes and a.op not in (Op.DATA, Op.LOSS)]


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


def test_drawn_table_of_tspipe() -> None:
    """Its order: a backward takes as long as two forwards there."""
    schedule = generate("tspipe", 2, 1)  # one microbatch, which it cuts in two
    assert [work(row) for row in schedule.rows] == [[w for w in row if w != ".."] for row in drawn(tspipe_module)]


def test_drawn_table_of_fill() -> None:
    """A steady step: a teacher's forward for the next step stands where the student would idle."""
    equal = StageCosts(*[(1.0,) * 3] * 4)
    schedule = generate("fill", 3, 4, costs=equal)
    table = drawn(fill_module)
    assert timed(schedule, 3, step=6) == table
    for row, words in zip(schedule.rows, table, strict=True):
        endless = " ".join(w.upper() for w in words * 2)  # a period may be cut elsewhere than a picture
        assert " ".join(w.upper() for w in work(row)) in endless


# ---------------------------------------------------------------- tables by hand


def test_tspipe_with_two_views() -> None:
    """A batch is one microbatch in two views, cut in halves: units 0 and 2 are the first view, 1 and 3 the second.

    Rank 0 runs 2 (n - 1 - stage) = 2 teacher forwards, that is all 4 units, before its backwards; rank 1 none.
    """
    schedule = generate("tspipe", 2, 1, momentum=True, views=2, teacher_views=2, batch_loss=True)
    assert work_of(schedule) == [
        "S0F0@0 S0F1@0 S0F2@0 S0F3@0 T0F0@1 T0F1@1 T0F2@1 T0F3@1 S0B0@0 S0B1@0 S0B2@0 S0B3@0 S0U@0 T0E@0",
        "S1F0@0 S1F1@0 S1F2@0 S1F3@0 S1L0@0 S1B0@0 S1B1@0 S1B2@0 S1B3@0 T1F0@1 T1F1@1 T1F2@1 T1F3@1 S1U@0 T1E@0",
    ]
    assert schedule.stash == (4, 4)
    assert check(schedule).staleness == 1


def test_tspipe_keeps_every_rank_busy() -> None:
    """With t = f = 1 and b = 2, a unit's forward takes half a second, drawn as one word, and its backward two words."""
    costs = uniform(2, 1, 1, 2, views=2)
    schedule = generate("tspipe", 2, 1, momentum=True, views=2, teacher_views=2, batch_loss=True)
    trace = simulate(schedule, costs)
    assert trace.seconds_per_step == 8.0
    assert trace.bubble == pytest.approx(0.0, abs=1e-12)
    step = 5
    ends = sorted(e.end for e in trace.events if e.action.step == step - 1 and e.action.op is Op.UPDATE)
    table = []
    for rank, start in enumerate(ends):  # rank 1 is half a second later all along
        inside = [e for e in trace.events if e.rank == rank and e.seconds and start <= e.start < start + 8.0]
        table.append(" ".join(w for e in inside for w in [word(e.action, step), "--"][: round(e.seconds / 0.5)]))
    assert table == [
        "F0 F1 F2 F3 t0 t1 t2 t3 B0 -- B1 -- B2 -- B3 --",
        "F0 F1 F2 F3 B0 -- B1 -- B2 -- B3 -- t0 t1 t2 t3",
    ]
    assert ends[1] - ends[0] == 0.5


def test_tspipe_with_a_frozen_teacher_is_exact() -> None:
    schedule = generate("tspipe", 3, 1, clip=True)
    assert work_of(schedule) == [
        "S0F0@0 S0F1@0 T0F0@1 T0F1@1 S0B0@0 S0B1@0 S0N@0 S0U@0",
        "S1F0@0 S1F1@0 T1F0@1 T1F1@1 S1B0@0 S1B1@0 S1N@0 S1U@0",
        "S2F0@0 S2F1@0 S2L0@0 S2B0@0 S2L1@0 S2B1@0 T2F0@1 T2F1@1 S2N@0 S2U@0",
    ]
    assert check(schedule).staleness == 0


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


def test_async_of_one_stage() -> None:
    """The update of a step comes as ever; the next step's forward does not wait for it."""
    schedule = generate("async", 2, 1, momentum=True)
    versions = check(schedule, num_steps=4).versions
    assert [(v.student, v.teacher) for v in versions] == [((k,), (k,)) for k in (0, 0, 1, 2)]


def test_async_with_two_views_does_not_get_stuck() -> None:
    check(generate("async", 3, 2, momentum=True, views=2, teacher_views=2))


# ---------------------------------------------------------------- closed forms

sizes = st.integers(1, 5), st.integers(1, 10)
seconds = st.floats(0.1, 10.0)


@pytest.mark.parametrize("strategy", ["gpipe", "1f1b", "fill"])
@given(*sizes, seconds, seconds)
@settings(max_examples=25, deadline=None)
def test_bubble_of_the_student_alone(strategy: str, n: int, m: int, f: float, b: float) -> None:
    """(n-1) / (M+n-1): GPipe, Huang et al. 2019, section 2.3; the same for 1F1B, Narayanan et al. 2021, section 2.2."""
    costs = uniform(n, 0.0, f, b)
    trace = simulate(generate(strategy, n, m, teacher=False, costs=costs), costs)
    assert trace.bubble == pytest.approx((n - 1) / (m + n - 1), abs=1e-9)


@pytest.mark.parametrize("strategy", ["gpipe", "1f1b"])
@given(*sizes, st.floats(0.0, 1.0), seconds, seconds)
@settings(max_examples=25, deadline=None)
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
@settings(max_examples=25, deadline=None)
def test_step_of_teacher_first_with_a_longer_teacher(
    strategy: str, n: int, m: int, times: float, f: float, b: float
) -> None:
    """A teacher that is slower than the student's forward keeps the last rank waiting by (n-1)(t-f)."""
    t = times * f
    trace = simulate(generate(strategy, n, m), uniform(n, t, f, b))
    assert trace.seconds_per_step == pytest.approx(m * t + (m + n - 1) * (f + b) + (n - 1) * (t - f), rel=1e-9)


@pytest.mark.parametrize("batch_loss", [False, True])
@pytest.mark.parametrize("strategy", ["gpipe", "1f1b"])
@given(*sizes, st.floats(0.0, 1.0), seconds, seconds, seconds)
@settings(max_examples=15, deadline=None)
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


@given(st.integers(1, 5), st.integers(1, 6), st.lists(seconds, min_size=15, max_size=15))
@settings(max_examples=20, deadline=None)
def test_sequential_keeps_one_device_busy(n: int, m: int, s: list[float]) -> None:
    """However unequal the stages are, whether the teacher moves or not, in one view or two."""
    costs = StageCosts(tuple(s[:n]), tuple(s[5 : 5 + n]), (0.0,) * n, tuple(s[10 : 10 + n]), views=(1.0, 0.5))
    trace = simulate(generate("sequential", n, m), costs)
    assert trace.utilisation == pytest.approx(1 / n, rel=1e-9)
    assert trace.seconds_per_step == pytest.approx(m * sum(costs.forward + costs.backward + costs.teacher), rel=1e-9)
    trace = simulate(generate("sequential", n, m, momentum=True, views=2, batch_loss=True, clip=True), costs)
    assert trace.utilisation == pytest.approx(1 / n, rel=1e-9)
    step = m * (1.5 * sum(costs.forward + costs.backward) + sum(costs.teacher))
    assert trace.seconds_per_step == pytest.approx(step, rel=1e-9)


@pytest.mark.parametrize("strategy", ["gpipe", "1f1b", "fill"])
@given(*sizes, st.floats(0.1, 1.0), seconds, seconds)
@settings(max_examples=8, deadline=None)
def test_step_of_an_exact_momentum_teacher(strategy: str, n: int, m: int, share: float, f: float, b: float) -> None:
    """M (t + f + b) + (n - 1) (max(t, f) + b) for whole backwards (docs/filling.md). Teacher first is as good as any."""
    t, m = share * f, min(m, 6)
    costs = uniform(n, t, f, b)
    trace = simulate(generate(strategy, n, m, momentum=True, costs=costs), costs)
    assert trace.seconds_per_step == pytest.approx(m * (t + f + b) + (n - 1) * (f + b), rel=1e-9)


@given(st.integers(1, 4), st.integers(1, 8), st.sampled_from([1.0, 2.0, 3.0]))
@settings(max_examples=15, deadline=None)
def test_fill_reaches_the_limit_of_equal_stages(n: int, m: int, b: float) -> None:
    """Nothing but the work of a rank, or the student's own path, bounds a step (docs/schedules.md).

    Where a teacher's forwards do not divide the gaps evenly, a step takes a little longer.
    """
    costs = uniform(n, 1.0, 1.0, b)
    limit = max(m * (2 + b), (m + n - 1) * (1 + b))
    assert seconds_per_step("fill", n, m, costs) == pytest.approx(limit, rel=1e-9)


def test_fill_where_a_student_alone_idles() -> None:
    """The project's figures for a frozen teacher at t = f = 1, b = 2."""
    utilisation = simulate(generate("fill", 4, 8), uniform(4, 1, 1, 2)).utilisation
    assert utilisation == pytest.approx(32 / 33, rel=1e-9)
    assert round(utilisation, 3) == 0.970


@pytest.mark.parametrize("strategy", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("n", "m", "utilisation"), [(4, 8, 0.780), (8, 16, 0.753), (8, 8, 0.604)])
def test_teacher_first_figures(strategy: str, n: int, m: int, utilisation: float) -> None:
    """The figures of teacher first, which another simulator computed too."""
    assert simulate(generate(strategy, n, m), uniform(n, 1, 1, 2)).utilisation == pytest.approx(utilisation, abs=6e-4)


@pytest.mark.slow
def test_fill_at_sixteen_stages() -> None:
    costs = uniform(16, 1, 1, 2)
    schedule = generate("fill", 16, 16, costs=costs)
    check(schedule)
    assert simulate(schedule, costs).seconds_per_step == pytest.approx((16 + 16 - 1) * 3)


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
        (
            "filll",
            2,
            2,
            r"no strategy 'filll' \(did you mean 'fill'\?\); there are sequential, gpipe, 1f1b, tspipe, async, fill",
        ),
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


def test_forward_only() -> None:
    schedule = forward_only(3, 2)
    check(schedule)
    assert [work(row) for row in schedule.rows] == [["F0", "F1"]] * 3
    assert schedule.stash == (0, 0, 0)


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
    assert simulate(filled, costs).seconds_per_step <= simulate(
        generate("1f1b", 2, 3, momentum=True), costs
    ).seconds_per_step * (1 + 1e-9)
