"""The drawn tables, the closed forms and the knobs of every strategy."""

import re
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipestill.costs import Costs, Link, StageCosts
from pipestill.errors import PlanError
from pipestill.schedule import STRATEGIES, Action, Op, Role, Schedule, check, generate
from pipestill.schedule import fill as fill_module
from pipestill.schedule import gpipe as gpipe_module
from pipestill.schedule import one_f_one_b as one_f_one_b_module
from pipestill.schedule import sequential as sequential_module
from pipestill.schedule.simulate import simulate


def uniform(num_stages: int, teacher: float, forward: float, backward: float) -> StageCosts:
    return Costs.uniform(num_stages, teacher, forward, backward).stages([1] * num_stages, [1] * num_stages)


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


def word(action: Action, step: int) -> str:
    letter = action.op.value
    if action.role is Role.TEACHER:
        letter = "T" if action.step == step else "t"
    return letter if action.microbatch is None else f"{letter}{action.microbatch}"


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


def test_drawn_table_of_fill() -> None:
    """A steady step: a teacher's forward for the next step stands where the student would idle."""
    equal = StageCosts(*[(1.0,) * 3] * 4)
    schedule = generate("fill", 3, 4, costs=equal)
    table = drawn(fill_module)
    assert timed(schedule, 3, step=6) == table
    for row, words in zip(schedule.rows, table, strict=True):
        endless = " ".join(w.upper() for w in words * 2)  # a period may be cut elsewhere than a picture
        assert " ".join(w.upper() for w in work(row)) in endless


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


@given(st.integers(1, 5), st.integers(1, 6), st.lists(seconds, min_size=15, max_size=15))
@settings(max_examples=40, deadline=None)
def test_sequential_keeps_one_device_busy(n: int, m: int, s: list[float]) -> None:
    """However unequal the stages are."""
    costs = StageCosts(tuple(s[:n]), tuple(s[5 : 5 + n]), (0.0,) * n, tuple(s[10 : 10 + n]))
    trace = simulate(generate("sequential", n, m), costs)
    assert trace.utilisation == pytest.approx(1 / n, rel=1e-9)
    assert trace.seconds_per_step == pytest.approx(m * sum(costs.forward + costs.backward + costs.teacher), rel=1e-9)


@given(st.integers(1, 4), st.integers(1, 8), st.sampled_from([1.0, 2.0, 3.0]))
@settings(max_examples=20, deadline=None)
def test_fill_reaches_the_limit_of_equal_stages(n: int, m: int, b: float) -> None:
    """Nothing but the work of a rank, or the student's own path, bounds a step (PAPERS.md, section 3).

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
    assert simulate(generate("fill", 8, 16), uniform(8, 1, 1, 2)).utilisation >= 0.92
    assert simulate(generate("fill", 8, 8), uniform(8, 1, 1, 2)).utilisation == pytest.approx(0.711, abs=5e-4)


@pytest.mark.parametrize("strategy", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("n", "m", "utilisation"), [(4, 8, 0.780), (8, 16, 0.753), (8, 8, 0.604)])
def test_teacher_first_figures(strategy: str, n: int, m: int, utilisation: float) -> None:
    """The rows `teacher first` of PAPERS.md, section 3, which another simulator computed."""
    assert simulate(generate(strategy, n, m), uniform(n, 1, 1, 2)).utilisation == pytest.approx(utilisation, abs=6e-4)


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
    assert generate("sequential", n, m).run_ahead == 1
    assert generate("gpipe", n, m).run_ahead == generate("1f1b", n, m).run_ahead == m


@pytest.mark.parametrize("run_ahead", [1, 2, 3, 5, 8, 13])
def test_fill_keeps_to_run_ahead(run_ahead: int) -> None:
    schedule = generate("fill", 4, 8, run_ahead=run_ahead)
    assert check(schedule).run_ahead == schedule.run_ahead <= run_ahead


def test_more_memory_is_never_slower() -> None:
    costs = uniform(4, 1, 1, 2)
    made = [generate("fill", 4, 8, costs=costs, run_ahead=ahead) for ahead in (1, 2, 5, 12)]
    steps = [simulate(schedule, costs).seconds_per_step for schedule in made]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == pytest.approx(33)


@pytest.mark.parametrize("run_ahead", [0, -1])
def test_fill_without_room_for_a_teacher_output(run_ahead: int) -> None:
    with pytest.raises(PlanError, match=f"run_ahead is {run_ahead}; .* at least 1 microbatch"):
        generate("fill", 4, 8, run_ahead=run_ahead)


# ---------------------------------------------------------------- knobs and names


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_has_one_line_about_it(strategy: str) -> None:
    assert STRATEGIES[strategy]
    assert "\n" not in STRATEGIES[strategy]
    assert generate(strategy, 2, 2).strategy == strategy


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_a_teacher(strategy: str) -> None:
    schedule = generate(strategy, 3, 4, teacher=False)
    assert check(schedule).run_ahead == 0
    assert {a.role for row in schedule.rows for a in row} == {Role.STUDENT}


@pytest.mark.parametrize(
    ("strategy", "n", "m", "message"),
    [
        ("1f1b", 0, 4, "0 stages; expected at least 1"),
        ("fill", 2, 0, "0 microbatches; expected at least 1"),
        ("filll", 2, 2, r"no strategy 'filll' \(did you mean 'fill'\?\); there are sequential, gpipe, 1f1b, fill"),
        ("zebra", 2, 2, "no strategy 'zebra'; there are"),
    ],
)
def test_what_cannot_be_generated(strategy: str, n: int, m: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        generate(strategy, n, m)


@pytest.mark.parametrize("strategy", ["sequential", "gpipe", "1f1b"])
def test_run_ahead_belongs_to_fill(strategy: str) -> None:
    with pytest.raises(PlanError, match=f"run_ahead is a knob of 'fill'; strategy '{strategy}' has none"):
        generate(strategy, 2, 2, run_ahead=2)


def test_costs_of_another_number_of_stages() -> None:
    with pytest.raises(PlanError, match="costs are of 2 student and 2 teacher stages, the schedule has 3"):
        generate("fill", 3, 4, costs=uniform(2, 1, 1, 1))
    with pytest.raises(PlanError, match="costs are of 2 student and 0 teacher stages, the schedule has 2"):
        generate("fill", 2, 4, costs=StageCosts((1.0, 1.0), (1.0, 1.0), (0.0, 0.0)))


def test_forward_only() -> None:
    schedule = gpipe_module.forward_only(3, 2)
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
