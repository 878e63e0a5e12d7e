"""TSPipe's schedule and the asynchronous one: their tables, busy ranks and versions."""

import pytest
from schedule.pipeline.tables import drawn, work
from schedule.tasks import uniform, word, work_of

from pipestill.schedule import Op, check, generate
from pipestill.schedule.pipeline import tspipe as tspipe_module
from pipestill.schedule.simulate import simulate


def test_drawn_table_of_tspipe() -> None:
    """Its order: a backward takes as long as two forwards there."""
    schedule = generate("tspipe", 2, 1)  # one microbatch, which it cuts in two
    assert [work(row) for row in schedule.rows] == [[w for w in row if w != ".."] for row in drawn(tspipe_module)]


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
    assert table == ["F0 F1 F2 F3 t0 t1 t2 t3 B0 -- B1 -- B2 -- B3 --", "F0 F1 F2 F3 B0 -- B1 -- B2 -- B3 -- t0 t1 t2 t3"]
    assert ends[1] - ends[0] == 0.5


def test_tspipe_with_a_frozen_teacher_is_exact() -> None:
    schedule = generate("tspipe", 3, 1, clip=True)
    assert work_of(schedule) == [
        "S0F0@0 S0F1@0 T0F0@1 T0F1@1 S0B0@0 S0B1@0 S0N@0 S0U@0",
        "S1F0@0 S1F1@0 T1F0@1 T1F1@1 S1B0@0 S1B1@0 S1N@0 S1U@0",
        "S2F0@0 S2F1@0 S2L0@0 S2B0@0 S2L1@0 S2B1@0 T2F0@1 T2F1@1 S2N@0 S2U@0",
    ]
    assert check(schedule).staleness == 0


def test_async_of_one_stage() -> None:
    """The update of a step comes as ever; the next step's forward does not wait for it."""
    schedule = generate("async", 2, 1, momentum=True)
    versions = check(schedule, num_steps=4).versions
    assert [(v.student, v.teacher) for v in versions] == [((k,), (k,)) for k in (0, 0, 1, 2)]


def test_async_with_two_views_does_not_get_stuck() -> None:
    check(generate("async", 3, 2, momentum=True, views=2, teacher_views=2))
