"""What work takes and waits for."""

from dataclasses import replace

from schedule.tasks import lists_of, uniform

from pipestill.costs import Link
from pipestill.schedule import Action
from pipestill.schedule.pipeline.structure import pipeline
from pipestill.schedule.pipeline.work import Wait, WorkTable, most_ahead


def test_waits_name_results_their_step_and_how_long_they_travel() -> None:
    structure = pipeline(2, 1, momentum=True)
    costs = replace(uniform(2, 1, 2, 3), link=Link(latency_seconds=0.5), interference=2.0)
    table = WorkTable(structure, costs)
    action = Action.parse
    assert table.seconds[action("S1F0@0")] == 4.0, "interference makes all work longer"
    assert table.waits[action("S1F0@0")] == [Wait(action("S0F0@0"), 0, 0.5, far=True), Wait(action("S1U@0"), -1, 0.0, far=False)]
    assert table.waits[action("T0F0@0")] == [Wait(action("T0E@0"), -1, 0.0, far=False)], "the data is left out"


def test_the_teacher_is_as_far_ahead_as_its_furthest_rank() -> None:
    structure = pipeline(2, 2)
    rows = lists_of("T0F0@0 S0F0@0 T0F1@0 S0F1@0", "S1F0@0 T1F0@1 T1F1@1 S1F1@0")
    assert most_ahead(rows, structure) == 3, "rank 1 did the four of two steps when the student had done one"


def test_units_of_the_student_measure_how_far_ahead() -> None:
    """The teacher sees one of two views, so that its two forwards are two microbatches, or four units of the student."""
    structure = pipeline(1, 2, views=2, teacher_views=1)
    assert most_ahead(lists_of("T0F0@0 T0F1@0 S0F0@0 S0F1@0 S0F2@0 S0F3@0"), structure) == 2
