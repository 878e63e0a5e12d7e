"""The local search."""

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from schedule.pipeline.tables import rows_of_task
from schedule.tasks import Task, lists_of, tasks, uniform

from pipestill.costs import StageCosts
from pipestill.schedule import Op, check
from pipestill.schedule.comms import connect
from pipestill.schedule.pipeline.clock import Clock
from pipestill.schedule.pipeline.improve import Rows, improve
from pipestill.schedule.pipeline.structure import PipelineStructure, pipeline
from pipestill.schedule.simulate import simulate

FROZEN = pipeline(2, 1)
TEACHER_FIRST = lists_of("T0F0@0 S0F0@0 S0B0@0 S0U@0", "T1F0@0 S1F0@0 S1L0@0 S1B0@0 S1U@0")
COSTS = uniform(2, 1, 1, 2)
HALVES = (Op.INPUT, Op.WEIGHT)


def seconds(rows: Rows, structure: PipelineStructure, costs: StageCosts) -> float:
    schedule = connect("improved", structure, rows, (9,) * len(rows), 99)
    check(schedule)
    return simulate(schedule, costs).seconds_per_step


def test_teacher_goes_into_the_bubble() -> None:
    """Teacher first takes 1 + 2 * 3 s. The student alone takes 6, of which each rank idles 3: room for its teacher."""
    assert seconds(TEACHER_FIRST, FROZEN, COSTS) == 7.0
    better = improve(TEACHER_FIRST, Clock(FROZEN, COSTS), goal=6.0, tries=2000, most_steps=4)
    assert seconds(better, FROZEN, COSTS) == 6.0


def test_nothing_is_tried_where_the_goal_is_reached() -> None:
    assert improve(TEACHER_FIRST, Clock(FROZEN, COSTS), goal=7.0, tries=2000, most_steps=4) is TEACHER_FIRST
    assert improve(TEACHER_FIRST, Clock(FROZEN, COSTS), goal=6.0, tries=0, most_steps=4) is TEACHER_FIRST


def test_every_rank_finds_the_same() -> None:
    found = [improve(TEACHER_FIRST, Clock(FROZEN, COSTS), goal=0.0, tries=300, most_steps=4) for _ in range(2)]
    assert found[0] == found[1]


def test_no_further_ahead_than_allowed() -> None:
    found = improve(TEACHER_FIRST, Clock(FROZEN, COSTS), goal=0.0, tries=2000, most_steps=1)
    assert max(action.step for row in found for action in row) <= 1


def test_teacher_does_not_pass_the_loss_on_the_last_rank() -> None:
    """Symptom: the search ended in rows that get stuck, so nothing that it had found was used."""
    structure = replace(FROZEN, momentum=True)
    rows = lists_of("T0F0@0 S0F0@0 S0B0@0 S0U@0 T0E@0", "T1F0@0 S1F0@0 S1L0@0 S1B0@0 S1U@0 T1E@0")
    found = improve(rows, Clock(structure, COSTS), goal=0.0, tries=1000, most_steps=2)
    check(connect("improved", structure, found, (1, 1), 99))


def test_exact_teacher_never_passes_its_update() -> None:
    """The bubble is there all the same, but what would fill it reads old weights."""
    structure = replace(FROZEN, momentum=True)
    rows = lists_of("T0F0@0 S0F0@0 S0B0@0 S0U@0 T0E@0", "T1F0@0 S1F0@0 S1L0@0 S1B0@0 S1U@0 T1E@0")
    found = improve(rows, Clock(structure, COSTS), goal=0.0, tries=1000, most_steps=2)
    for row in found:
        assert row[-1].op is Op.EMA
        assert all(action.step == 0 for action in row)


def test_gradient_of_weights_stays_between_its_backward_and_the_update() -> None:
    """F0 F1 I0 W0 I1 W1 on rank 0 has rank 1 wait for nobody, but rank 1's own W0 holds I1 up: 9 s become 8."""
    structure = pipeline(2, 2, teacher=False, split=True)
    rows = lists_of(
        "S0F0@0 S0F1@0 S0I0@0 S0W0@0 S0I1@0 S0W1@0 S0U@0", "S1F0@0 S1L0@0 S1I0@0 S1W0@0 S1F1@0 S1L1@0 S1I1@0 S1W1@0 S1U@0"
    )
    costs = uniform(2, 1, 1, 2, weight=1)
    before = seconds(rows, structure, costs)
    found = improve(rows, Clock(structure, costs), goal=0.0, tries=2000, most_steps=0)
    assert seconds(found, structure, costs) < before
    for before_row, row in zip(rows, found, strict=True):
        assert Counter(before_row) == Counter(row)
        fixed = [a for a in before_row if a.op is not Op.WEIGHT]
        assert [a for a in row if a.op is not Op.WEIGHT] == fixed


@given(tasks(["gpipe", "1f1b"], most_stages=3, most_units=6))
@settings(max_examples=8, deadline=None)
def test_improved_rows_are_valid_and_no_slower(task: Task) -> None:
    """Of a student alone, whose backwards are cut in two: its work keeps its order, and so do its gradients of weights."""
    task = replace(task, asked={**task.asked, "teacher": False, "momentum": False})
    costs = uniform(task.num_stages, 2, 1, 3, weight=1, views=task.asked["views"])
    whole, structure = rows_of_task(task, costs)
    structure = replace(structure, split=True)
    rows = [[b for a in row for b in ([replace(a, op=op) for op in HALVES] if a.op is Op.BACKWARD else [a])] for row in whole]
    found = improve(rows, Clock(structure, costs), goal=0.0, tries=200, most_steps=0)
    assert seconds(found, structure, costs) <= seconds(rows, structure, costs) * (1 + 1e-9)
    for before, after in zip(rows, found, strict=True):
        for late in (True, False):
            assert [a for a in before if (a.op is Op.WEIGHT) == late] == [a for a in after if (a.op is Op.WEIGHT) == late]
