"""Plans: from costs, by hand, to JSON and back."""

import json
from collections import Counter
from typing import Any

import pytest

from pipestill import Plan
from pipestill.costs import BlockCosts, Costs, Link
from pipestill.errors import ConfigError, PlanError
from pipestill.plan import make_plan, plan as plan_module
from pipestill.schedule import PIPELINE_STRATEGIES

COSTS = Costs(
    tuple(BlockCosts(f"s{i}", 1.0 + i, 2.0, 0.5, 10, 20, 30) for i in range(6)),
    tuple(BlockCosts(f"t{i}", 1.0) for i in range(5)),
    loss_seconds=0.25,
    data_seconds=0.125,
    rows=4,
    link=Link(1e-3, 1e9),
    interference=1.25,
)
ALONE = Costs(COSTS.student)


def plan(costs: Costs = COSTS, **changes: Any) -> Plan:
    return make_plan(costs, **{"devices": 3, "strategy": "fill", "microbatches": 4, **changes})


@pytest.mark.parametrize("costs", [COSTS, ALONE])
@pytest.mark.parametrize("strategy", PIPELINE_STRATEGIES)
def test_every_strategy(strategy: str, costs: Costs) -> None:
    if strategy == "async" or (strategy == "tspipe" and costs is ALONE):
        what = "momentum teachers" if strategy == "async" else "this task has none"
        with pytest.raises(PlanError, match=f"'{strategy}' .*{what}"):
            plan(costs, strategy=strategy)
        return
    made = plan(costs, strategy=strategy)
    assert made.num_devices == 3
    assert sum(made.student_partition) == 6
    assert sum(made.teacher_partition) == len(costs.teacher)
    assert made.schedule.strategy == strategy
    assert made.prediction.seconds_per_step >= made.limit_seconds_per_step * (1 - 1e-9)


def test_a_plan_is_made_and_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is complete at birth: nothing is generated, proved or simulated when somebody looks at it."""
    counts = Counter[str]()

    def counted(name: str) -> Any:
        function = getattr(plan_module, name)

        def call(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*args, **options)

        return call

    for name in ("generate", "check", "simulate"):
        monkeypatch.setattr(plan_module, name, counted(name))
    made = plan(strategy="gpipe", student_partition=(2, 2, 2), teacher_partition=(2, 2, 1))
    assert made.proof.problems == () and made.prediction.events and made.schedule.rows
    assert counts == {"generate": 1, "check": 1, "simulate": 1}, "both level partitions are the given one"
    again = made.with_stash("n")
    assert again.stash == "n" and again.schedule is made.schedule
    assert set(counts.values()) == {1}


def test_json_round_trip() -> None:
    level = Costs.uniform(3, 1.0, 1.0, 2.0)  # quick to find a schedule for
    for made in (plan(level), plan(ALONE), plan(level, run_ahead=5), plan(strategy="1f1b", student_partition=[4, 1, 1])):
        text = json.dumps(made.to_json())
        back = Plan.from_json(text)
        assert back == made
        assert back.schedule == made.schedule
        assert json.dumps(back.to_json()) == text


def test_partitions_by_hand() -> None:
    made = plan(strategy="1f1b", student_partition=[4, 1, 1], teacher_partition=(1, 1, 3))
    assert (made.student_partition, made.teacher_partition) == ((4, 1, 1), (1, 1, 3))
    made = plan(strategy="1f1b", student_partition=[4, 1, 1])
    assert made.student_partition == (4, 1, 1)
    assert sum(made.teacher_partition) == 5
    assert plan(ALONE, strategy="1f1b", teacher_partition=()).teacher_partition == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 0}, "0 devices; expected at least 1"),
        ({"microbatches": 0}, "0 microbatches; expected at least 1"),
        ({"devices": 6}, "the teacher has 5 blocks for 6 devices"),
        ({"devices": 7}, "the student has 6 blocks for 7 devices"),
        ({"student_partition": [3, 3]}, r"student partition \[3, 3\] has 2 stages for 3 devices"),
        ({"student_partition": [3, 3, 0]}, r"student partition \[3, 3, 0\] has an empty stage"),
        ({"student_partition": [3, 4, -1]}, r"\[3, 4, -1\] has an empty stage"),
        ({"student_partition": [2, 2, 3]}, r"adds up to 7, but the student has 6 blocks"),
        ({"teacher_partition": []}, r"teacher partition \[\] has 0 stages for 3 devices"),
        ({"costs": ALONE, "teacher_partition": [1, 1, 1]}, "for a task without a teacher; leave it out"),
        (
            {"student_partition": [1, 1], "teacher_partition": [9, 1, 1]},
            r"student partition \[1, 1\] has 2 stages for 3 devices; .*adds up to 2.*; teacher partition .* adds up to 11",
        ),
        ({"strategy": "fil"}, "no strategy 'fil' .*did you mean 'fill'"),
        ({"strategy": "gpipe", "run_ahead": 2}, "run_ahead is a knob of 'fill'"),
        ({"run_ahead": 0}, "run_ahead is 0; the teacher has to be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(**changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: "not JSON", "the plan is not JSON"),
        (lambda d: [d], "the plan is not one of version 1"),
        (lambda d: {**d, "version": 2}, "the plan is not one of version 1"),
        (lambda d: {k: v for k, v in d.items() if k != "costs"}, "lacks or does not know: 'costs'"),
        (lambda d: {k: v for k, v in d.items() if k != "strategy"}, "lacks or does not know: .*'strategy'"),
        (lambda d: {**d, "colour": "red"}, "lacks or does not know: .*'colour'"),
        (lambda d: {**d, "student_partition": 6}, "lacks or does not know"),
        (lambda d: {**d, "costs": {**d["costs"], "version": 9}}, "costs: expected a JSON object with version 1"),
        (lambda d: {**d, "costs": {**d["costs"], "student": [{"name": "x"}]}}, "costs: .*forward_seconds"),
        (lambda d: {**d, "microbatches": "8"}, "microbatches"),
        (lambda d: {**d, "microbatches": 0}, "microbatches"),
        (lambda d: {**d, "run_ahead": "many"}, "run_ahead"),
        (lambda d: {**d, "strategy": "fil"}, "no strategy 'fil'.*did you mean 'fill'"),
        (lambda d: {**d, "student_partition": [6, 1, 1]}, "student partition .* adds up to 8"),
        (lambda d: {**d, "student_partition": [2.0, 2.0, 2.0]}, "student partition .* whole numbers"),
        (lambda d: {**d, "teacher_partition": [3, 2]}, "teacher partition .* has 2 stages for 3 devices"),
        (lambda d: {**d, "costs": {**d["costs"], "student": []}}, "costs hold no student block"),
    ],
)
def test_a_broken_file_says_what_is_wrong(change: Any, message: str) -> None:
    changed = change(plan(strategy="1f1b").to_json())
    with pytest.raises((ConfigError, PlanError), match=message):
        Plan.from_json(changed if isinstance(changed, str) else json.dumps(changed))
