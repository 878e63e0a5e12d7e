"""Schedules as rows and as text."""

from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st
from schedule.tasks import Task, rows_of, tasks

from pipestill.schedule import KINDS, Action, Op, PipelineStructure, Schedule, generate
from pipestill.schedule.pipeline.sequential import forward_only

pytestmark = pytest.mark.usefixtures("_short_search")


def schedules() -> st.SearchStrategy[Schedule]:
    training = tasks(most_stages=3, most_units=4).map(Task.schedule)
    return training | st.builds(forward_only, st.integers(1, 4), st.integers(1, 5))


# ---------------------------------------------------------------- rows


def test_unrolled_rows_leave_out_steps_before_the_first_and_after_the_last() -> None:
    schedule = generate("fill", 1, 1)
    (row,) = schedule.rows
    written = [str(a) for a in row]
    assert written == ["S0D@1", "T0F0@0", "S0F0@0", "S0L0@0", "S0B0@0", "S0U@0"]
    ahead = replace(schedule, rows=(tuple(map(Action.parse, ["S0D@2", "S0F0@0", "T0F0@1", *written[3:]])),))
    assert ahead.lookahead == 2
    assert [" ".join(map(str, r)) for r in ahead.unroll(2)] == [
        "S0D@0 S0D@1 T0F0@0 S0F0@0 T0F0@1 S0L0@0 S0B0@0 S0U@0 S0F0@1 S0L0@1 S0B0@1 S0U@1"
    ]


@given(schedules(), st.integers(0, 5))
@settings(max_examples=10, deadline=None)
def test_unrolled_rows_hold_every_work_of_every_step(schedule: Schedule, num_steps: int) -> None:
    done = [a for row in schedule.unroll(num_steps) for a in row if a.computes]
    assert len(done) == len(set(done))
    assert set(done) == {a for step in range(num_steps) for a in schedule.structure.actions(step)}


def test_a_run_of_no_steps_is_empty() -> None:
    assert generate("1f1b", 2, 2).unroll(0) == [[], []]


def test_one_row_and_one_bound_a_rank() -> None:
    schedule = generate("1f1b", 2, 2)
    with pytest.raises(ValueError, match="1 rows and 2 stash bounds for 2 ranks"):
        replace(schedule, rows=schedule.rows[:1])
    with pytest.raises(ValueError, match="2 rows and 3 stash bounds for 2 ranks"):
        replace(schedule, stash=(1, 1, 1))


def test_work_of_a_step_before_its_period_is_refused() -> None:
    """Unrolling would leave out such work of the last step without a word."""
    schedule = generate("1f1b", 1, 1)
    row = tuple(a.at(-1) if a.op is Op.UPDATE else a for a in schedule.rows[0])
    with pytest.raises(ValueError, match=r"count from 0, its oldest step; got S0U@-1"):
        replace(schedule, rows=(row,))


# ---------------------------------------------------------------- text


@given(schedules())
@settings(max_examples=10, deadline=None)
def test_text_round_trip(schedule: Schedule) -> None:
    assert Schedule.from_text(schedule.to_text(), *KINDS) == schedule


def test_text() -> None:
    text = generate("sequential", 1, 1).to_text()
    assert text == (
        "pipestill schedule 1\n"
        "strategy: sequential\n"
        "student ranks: 0\n"
        "teacher ranks: 0\n"
        "microbatches: 1\n"
        "views: 1\n"
        "teacher views: 1\n"
        "staleness: 0\n"
        "student staleness: 0\n"
        "pieces: 1\n"
        "serial: yes\n"
        "train: yes\n"
        "batch loss: no\n"
        "momentum: no\n"
        "split: no\n"
        "clip: no\n"
        "stash: 1\n"
        "run ahead: 1\n"
        "rank 0: S0D@1 T0F0@0 S0F0@0 S0L0@0 S0B0@0 S0U@0\n"
    )


def test_text_of_everything_else() -> None:
    structure = PipelineStructure(
        student_ranks=(0,),
        teacher_ranks=(0,),
        num_microbatches=2,
        views=3,
        teacher_views=2,
        batch_loss=True,
        momentum=True,
        staleness=1,
        student_staleness=1,
        split=True,
        clip=True,
        pieces=2,
    )
    schedule = Schedule("mine", structure, rows_of("S0D@1 S0I4@0 S0W4@0 S0N@0 S0U@0 T0E@0"), (6,), 9)
    assert schedule.to_text() == (
        "pipestill schedule 1\n"
        "strategy: mine\n"
        "student ranks: 0\n"
        "teacher ranks: 0\n"
        "microbatches: 2\n"
        "views: 3\n"
        "teacher views: 2\n"
        "staleness: 1\n"
        "student staleness: 1\n"
        "pieces: 2\n"
        "serial: no\n"
        "train: yes\n"
        "batch loss: yes\n"
        "momentum: yes\n"
        "split: yes\n"
        "clip: yes\n"
        "stash: 6\n"
        "run ahead: 9\n"
        "rank 0: S0D@1 S0I4@0 S0W4@0 S0N@0 S0U@0 T0E@0\n"
    )
    assert Schedule.from_text(schedule.to_text(), *KINDS) == schedule


@given(schedules(), st.data())
@settings(max_examples=10, deadline=None)
def test_text_without_one_of_its_lines(schedule: Schedule, data: st.DataObject) -> None:
    lines = [line for line in schedule.to_text().splitlines() if not line.startswith("features:")]  # which may be left out
    gone = lines.pop(data.draw(st.integers(0, len(lines) - 1)))
    with pytest.raises(ValueError, match="schedule") as error:
        Schedule.from_text("\n".join(lines), *KINDS)
    assert gone.split(":")[0] in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pipestill schedule 1", "pipestill schedule 2", "expected the first line to be 'pipestill schedule 1'"),
        ("train: yes", "train: maybe", "'train: maybe' in a schedule: expected yes or no"),
        ("serial: no", "serial:", "'serial: ' in a schedule: expected yes or no"),
        ("microbatches: 2", "microbatches: two", "'microbatches: two' in a schedule: expected a whole number"),
        ("microbatches: 2", "microbatches: -2", "'microbatches: -2' in a schedule: expected a whole number"),
        ("microbatches: 2", "microbatches: 1_0", "'microbatches: 1_0' in a schedule: expected a whole number"),
        ("microbatches: 2", "microbatches: 0", "at least one student stage and one microbatch"),
        ("run ahead: 2", "run ahead: ", "'run ahead: ' in a schedule: expected a whole number"),
        ("stash: 2 1", "stash: 2 x", "'stash: 2 x' in a schedule: expected whole numbers with spaces between"),
        ("stash: 2 1", "stash:", "'stash: ' in a schedule: expected whole numbers"),
        ("stash: 2 1", "stash: 2", "2 rows and 1 stash bounds for 2 ranks"),
        ("student ranks: 0 1", "student ranks: none", "at least one student stage"),
        ("student ranks: 0 1", "student ranks: 0 3", r"ranks \[0, 1, 3\] are not 0 to 2"),
        ("strategy: 1f1b", "strategy: 1f1b\nstrategy: gpipe", "a second one of its kind: 'strategy: gpipe'"),
        ("strategy: 1f1b", "strategy: 1f1b\nnonsense", "not a line of a schedule.*'nonsense'"),
        ("strategy: 1f1b", "strategy: 1f1b\nrank 2: S0U@0", "lines that mean nothing: rank 2"),
        ("rank 1:", "rank 7:", "the schedule lacks the line 'rank 1'"),
        ("\nviews: 1", "\nviews: 0", "a teacher that sees 1 of 0 views; expected 1 to all"),
        ("teacher views: 1", "teacher views: 2", "a teacher that sees 2 of 1 views; expected 1 to all"),
        ("\nstaleness: 0", "\nstaleness: yes", "'staleness: yes' in a schedule: expected a whole number"),
        ("\nstaleness: 0", "\nstaleness: 1", "only a momentum teacher's weights, and then the student's, can be stale"),
        ("pieces: 1", "pieces: 3", "2 microbatches are no multiple of 3 pieces"),
        ("clip: no", "clip: 1", "'clip: 1' in a schedule: expected yes or no"),
        ("S1U@0", "S1X@0", "'S1X@0' is not an action"),
        ("S1U@0", "S1F@0", "'S1F@0' is not an action: op FORWARD needs microbatch"),
    ],
)
def test_malformed_text(old: str, new: str, message: str) -> None:
    text = generate("1f1b", 2, 2).to_text()
    assert text.count(old) == 1
    with pytest.raises(ValueError, match=message):
        Schedule.from_text(text.replace(old, new), *KINDS)


@pytest.mark.parametrize("text", ["", "\n\n", "S0F0@0"])
def test_text_of_something_else(text: str) -> None:
    with pytest.raises(ValueError, match="not a schedule"):
        Schedule.from_text(text, *KINDS)


def test_text_may_be_indented_and_spaced() -> None:
    schedule = generate("gpipe", 2, 1)
    text = "\n\n".join("    " + line for line in schedule.to_text().splitlines())
    assert Schedule.from_text(text, *KINDS) == schedule
