"""Weight versions, stash and run-ahead of pipelines are what they declare."""

import re
from dataclasses import replace

import pytest
from schedule.tasks import assert_refused, rows_of, with_row
from schedule.valid import STALE, VALID

from pipestill.schedule import Action, Op, PipelineStructure, Role, check, generate
from pipestill.schedule.check import examine
from pipestill.schedule.comms import connect


@pytest.mark.parametrize("name", VALID)
def test_versions_are_those_of_a_plain_loop(name: str) -> None:
    """With an exact momentum teacher, both move in step; with a stale one, its first two steps read the first weights."""
    schedule = VALID[name]
    late = [(max(0, k - 1),) for k in range(4)]
    exact = [(k,) for k in range(4)]
    versions = check(schedule, num_steps=4).versions
    if schedule.structure.train:
        assert [v.step for v in versions] == list(range(4))
        assert [v.student for v in versions] == (late if name == "async" else exact)
    if not schedule.structure.teacher_ranks:
        assert {v.teacher for v in versions} <= {()}
    elif schedule.structure.momentum:
        assert [v.teacher for v in versions] == (late if name in STALE else exact)
    else:
        assert {v.teacher for v in versions} == {(0,)}


def test_forward_before_the_update_it_should_read() -> None:
    """One step stale: the checker counts versions and does not trust names."""
    schedule = VALID["1f1b"]
    update = next(i for i, a in enumerate(schedule.rows[2]) if a.op is Op.UPDATE)
    row = list(schedule.rows[2])
    first = next(i for i, a in enumerate(row) if a.op is Op.FORWARD and a.role is Role.STUDENT and a.computes)
    stale = [*row[:first], *row[first + 1 : update], row[first].at(1), *row[update:]]
    problems = examine(with_row(schedule, 2, tuple(stale))).problems
    assert "rank 2: S2F0@1 reads student version 0, expected version 1" in problems


def test_exact_teacher_that_starts_a_batch_before_it_moved() -> None:
    """As with a frozen teacher: no rank gets stuck on its own, but the weights are old ones."""
    structure = PipelineStructure((0,), (0,), 1, momentum=True)
    rows = rows_of("S0F0@0 T0F0@1 S0L0@0 S0B0@0 S0U@0 T0E@0")
    problems = examine(connect("early", structure, rows, (1,), run_ahead=9)).problems
    assert "rank 0: T0F0@1 reads teacher version 0, expected version 1" in problems


def test_stale_teacher_that_moves_before_its_last_forward() -> None:
    """TSPipe's promise is one step stale: a batch split over two versions is neither exact nor stale."""
    structure = PipelineStructure((0,), (0,), 2, momentum=True, staleness=1)
    rows = rows_of("S0F0@0 S0L0@0 S0B0@0 T0F0@1 S0F1@0 S0L1@0 S0B1@0 S0U@0 T0E@0 T0F1@1")
    problems = examine(connect("half", structure, rows, (1,), run_ahead=9)).problems
    assert problems == ("rank 0: T0F1@1 reads teacher version 1, expected version 0",)


def test_stale_teacher_declared_exact() -> None:
    """The checker counts versions and does not trust names."""
    schedule = VALID["ema-stale"]
    exact = replace(schedule, structure=replace(schedule.structure, staleness=0))
    for rank in range(2):
        assert_refused(exact, rank, Action.parse(f"T{rank}F0@1"))
    assert any("reads teacher version 0, expected version 1" in problem for problem in examine(exact).problems)


def test_exact_teacher_declared_stale() -> None:
    schedule = VALID["ema"]
    stale = replace(schedule, structure=replace(schedule.structure, staleness=1))
    problems = examine(stale).problems
    assert "rank 0: T0F0@1 reads teacher version 1, expected version 0" in problems


@pytest.mark.parametrize("name", ["sequential", "gpipe", "1f1b", "fill", "ema", "ema-stale"])
def test_stash_beyond_its_bound(name: str) -> None:
    schedule = VALID[name]
    for rank, bound in enumerate(schedule.stash):
        tight = replace(schedule, stash=(*schedule.stash[:rank], bound - 1, *schedule.stash[rank + 1 :]))
        problems = examine(tight).problems
        assert len(problems) == 1
        assert re.fullmatch(
            rf"rank {rank}: S{rank}F\d@\d makes {bound} stashed microbatches, the bound is {bound - 1}", problems[0]
        )


def test_gpipe_order_within_the_stash_of_1f1b() -> None:
    schedule = replace(generate("gpipe", 2, 4), stash=(2, 1))
    assert examine(schedule).problems == (
        "rank 0: S0F2@0 makes 3 stashed microbatches, the bound is 2",
        "rank 0: S0F3@0 makes 4 stashed microbatches, the bound is 2",
        "rank 1: S1F1@0 makes 2 stashed microbatches, the bound is 1",
        "rank 1: S1F2@0 makes 3 stashed microbatches, the bound is 1",
        "rank 1: S1F3@0 makes 4 stashed microbatches, the bound is 1",
    )


def test_stash_is_held_until_the_weight_gradient() -> None:
    structure = PipelineStructure((0,), (), 2, split=True)
    rows = rows_of("S0F0@0 S0L0@0 S0I0@0 S0F1@0 S0L1@0 S0I1@0 S0W0@0 S0W1@0 S0U@0")
    late = connect("late", structure, rows, (1,), run_ahead=0)
    assert examine(late).stash_peak == (2,)
    assert examine(late).problems == ("rank 0: S0F1@0 makes 2 stashed microbatches, the bound is 1",)
    early = rows_of("S0F0@0 S0L0@0 S0I0@0 S0W0@0 S0F1@0 S0L1@0 S0I1@0 S0W1@0 S0U@0")
    assert check(connect("early", structure, early, (1,), run_ahead=0)).stash_peak == (1,)


@pytest.mark.parametrize("name", ["sequential", "gpipe", "1f1b", "fill", "ema", "ema-split", "ema-stale"])
def test_teacher_further_ahead_than_its_bound(name: str) -> None:
    schedule = VALID[name]
    problems = examine(replace(schedule, run_ahead=schedule.run_ahead - 1)).problems
    assert problems
    for problem in problems:
        assert re.fullmatch(
            rf"rank \d: T\dF\d@\d runs {schedule.run_ahead} microbatches ahead, the bound is {schedule.run_ahead - 1}",
            problem,
        )
