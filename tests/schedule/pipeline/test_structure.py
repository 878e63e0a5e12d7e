"""The text, the labels and the lanes of the batch of a pipeline's structure."""

import re
from dataclasses import replace

import pytest
from schedule.tasks import assert_refused, rows_of, with_row
from schedule.valid import STALE, VALID

from pipestill.costs import Link, StageCosts
from pipestill.schedule import Action, Lane, Op, PipelineStructure, Role, check, generate
from pipestill.schedule.check import examine
from pipestill.schedule.comms import connect
from pipestill.schedule.pipeline.structure import Demands, pipeline

EVERYTHING = PipelineStructure(
    student_ranks=(0, 1),
    teacher_ranks=(0, 1),
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
    features=((0, 1), (1, 1)),
)


def test_stage_i_of_both_models_is_on_rank_i() -> None:
    assert pipeline(3, 2, clip=True) == PipelineStructure((0, 1, 2), (0, 1, 2), 2, clip=True)
    assert pipeline(2, 1, teacher=False) == PipelineStructure((0, 1), (), 1)


@pytest.mark.parametrize("structure", [EVERYTHING, PipelineStructure((1, 0), (), 1, serial=True, train=False)])
def test_lines_are_read_back(structure: PipelineStructure) -> None:
    fields = dict(line.split(": ") for line in structure.lines())
    assert not fields.keys().isdisjoint(PipelineStructure.line_names)
    assert PipelineStructure.from_lines(fields) == structure
    assert fields == {}


def test_labels() -> None:
    actions = [Action.parse(text) for text in ("S0F1@2", "T1F0@0>1", "T0E@1", "S0U@0", "S0D@1")]
    assert [EVERYTHING.label(a) for a in actions] == ["F1", "t0", "E", "U", "D"]
    folded = PipelineStructure((0, 0), (), 1)
    assert [folded.label(a) for a in actions[::3]] == ["S0F1", "S0U"]


def test_only_ranks_with_a_loss_are_sent_targets() -> None:
    lanes = [pipeline(3, 2, features=features).batch_lane(rank) for features in ((), ((0, 1),)) for rank in range(3)]
    assert lanes == [None, None, Lane.TARGET, Lane.TARGET, None, Lane.TARGET]


FEATURES = pipeline(3, 2, features=((0, 2), (0, 0), (1, 0), (2, 2)))
FEATURE_COSTS = StageCosts(
    (1.0,) * 3, (2.0,) * 3, (0.0,) * 3, (1.0,) * 3, loss=8.0, activation_bytes=(10, 20, 30), teacher_bytes=(40, 50, 60),
    link=Link(0.0, 1.0), feature_seconds=(1.0, 2.0, 4.0), feature_bytes=(100, 200, 400, 800),
)  # fmt: skip


@pytest.mark.parametrize(("action", "seconds"), [("S0L1@0", 1.0), ("S1L0@0", 2.0), ("S2L0@0", 12.0)])
def test_seconds_of_feature_losses(action: str, seconds: float) -> None:
    assert FEATURES.work_seconds(Action.parse(action), FEATURE_COSTS) == seconds
    busy = FEATURE_COSTS.busy_seconds(2)
    assert busy == [2 * (4 + loss) for loss in (1.0, 2.0, 12.0)]


@pytest.mark.parametrize(
    ("action", "destination", "seconds"),
    [
        ("T2F0@0", 0, 100.0),  # what only a feature takes
        ("T0F0@0", 1, 440.0),  # with the output that the next stage takes
        ("T0F0@0", 0, 200.0),
        ("T2F0@0", 2, 860.0),
        ("T1F0@0", 2, 50.0),
        ("S0F0@0", 1, 10.0),
        ("S2L0@0", 0, 0.0),
    ],
)
def test_seconds_of_messages_with_features(action: str, destination: int, seconds: float) -> None:
    assert FEATURES.transfer_seconds(Action.parse(action), destination, FEATURE_COSTS) == seconds


def test_stages_of_features_follow_from_partitions() -> None:
    demands = Demands(features=((0, 5), (2, 1), (1, 2)))
    assert demands.of_stages((1, 2), (2, 4))["features"] == ((0, 1), (1, 0), (1, 1))
    read_back = Demands(features=[[0, 5], [2, 1], [1, 2]])  # type: ignore[list-item, arg-type] - as JSON gives them
    assert read_back == demands


def test_no_two_ranks_share_work() -> None:
    assert all(EVERYTHING.sharers(a) == [] for a in EVERYTHING.actions())
    assert (EVERYTHING.by_block, EVERYTHING.batches_per_step) == (False, 1)
    assert replace(EVERYTHING, split=False).backward_ops == (Action.parse("S0B0@0").op,)


BOTH = PipelineStructure((0, 1), (0, 1), 1)


@pytest.mark.parametrize(
    ("action", "seconds"),
    [
        ("S1F0@0", 2.0),
        ("S1B0@0", 4.0),
        ("S1I0@0", 2.5),
        ("S1W0@0", 1.5),
        ("S0U@0", 5.0),
        ("T0F0@0", 7.0),
        ("T1E@0", 12.0),
        ("S1N@0", 0.0),
        ("S1L0@0", 9.0),
        ("S0D@0", 10.0),
    ],
)
def test_seconds_of_each_kind_of_work(action: str, seconds: float) -> None:
    """The two halves of a backward are as long as the whole."""
    costs = StageCosts((1.0, 2.0), (3.0, 4.0), (5.0, 6.0), (7.0, 8.0), loss=9.0, data=10.0, weight=(0.5, 1.5), ema=(11.0, 12.0))
    assert BOTH.work_seconds(Action.parse(action), costs) == seconds


def test_seconds_of_what_costs_leave_out() -> None:
    costs = StageCosts((1.0, 2.0), (3.0, 4.0), (5.0, 6.0), (7.0, 8.0))
    seconds = [BOTH.work_seconds(Action.parse(text), costs) for text in ("S1I0@0", "S1W0@0", "T1E@0")]
    assert seconds == [4.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("action", "seconds"),
    [
        ("S0F0@0", 1.0),
        ("S0F1@0", 3.0),
        ("S0F2@0", 1.0),
        ("S0B3@0", 6.0),
        ("S0I3@0", 4.5),
        ("S0W3@0", 1.5),
        ("T0F0@0", 5.0),
        ("T0F1@0", 5.0),  # of the second microbatch, which it sees in the first view alone
        ("S0U@0", 9.0),
    ],
)
def test_seconds_in_each_view(action: str, seconds: float) -> None:
    """The second view takes three times as long as the first; a teacher that sees one view has a unit a microbatch."""
    costs = StageCosts((1.0,), (2.0,), (9.0,), (5.0,), weight=(0.5,), views=(1.0, 3.0))
    structure = PipelineStructure((0,), (0,), 2, views=2, teacher_views=1)
    assert structure.work_seconds(Action.parse(action), costs) == seconds
    if Action.parse(action).microbatch is not None:  # cut in two, all that is done once a microbatch is half as long
        assert replace(structure, pieces=2).work_seconds(Action.parse(action), costs) == seconds / 2
    else:
        assert replace(structure, pieces=2).work_seconds(Action.parse(action), costs) == seconds


def test_seconds_of_a_loss_over_the_batch() -> None:
    """As much as all its microbatches, in however many pieces these are cut."""
    costs = StageCosts((1.0,), (2.0,), (0.0,), loss=0.5)
    loss = Action.parse("S0L0@0")
    assert PipelineStructure((0,), (), 6).work_seconds(loss, costs) == 0.5
    assert PipelineStructure((0,), (), 6, batch_loss=True).work_seconds(loss, costs) == 3.0
    assert PipelineStructure((0,), (), 6, pieces=2).work_seconds(loss, costs) == 0.25
    assert PipelineStructure((0,), (), 6, batch_loss=True, pieces=2).work_seconds(loss, costs) == 1.5


@pytest.mark.parametrize(
    ("action", "seconds"),
    [
        ("S0F0@0", 1.0),
        ("S1B0@0", 1.0),
        ("S2B0@0", 2.0),
        ("S2I0@0", 2.0),
        ("T1F0@0", 5.0),
        ("T0F0@0", 0.0),
        ("S0D@0", 0.0),
        ("S2N@0", 0.0),
    ],
)
def test_seconds_of_each_kind_of_transfer(action: str, seconds: float) -> None:
    """A gradient is as large as the activation that it belongs to: the one before its stage.

    What another rank than the next gets of a teacher's forward is nothing without features.
    """
    costs = StageCosts(*[(1.0,) * 3] * 4, activation_bytes=(1, 2, 3), teacher_bytes=(4, 5, 6), link=Link(0.0, 1.0))
    assert PipelineStructure((0, 1, 2), (0, 1, 2), 1).transfer_seconds(Action.parse(action), 2, costs) == seconds


def test_seconds_of_a_transfer_in_each_view_and_piece() -> None:
    """A view that takes half as long is half as large."""
    ones = (1.0, 1.0)
    costs = StageCosts(*[ones] * 4, activation_bytes=(8, 8), link=Link(0.25, 1.0), views=(1.0, 0.5))
    structure = PipelineStructure((0, 1), (0, 1), 2, views=2)
    seconds = [structure.transfer_seconds(Action.parse(f"S0F{u}@0"), 0, costs) for u in range(4)]
    assert seconds == [8.25, 4.25, 8.25, 4.25]
    halves = replace(structure, pieces=2)
    assert [halves.transfer_seconds(Action.parse(f"S1B{u}@0"), 0, costs) for u in range(2)] == [4.25, 2.25]


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
            rf"rank \d: T\dF\d@\d runs {schedule.run_ahead} microbatches ahead, the bound is {schedule.run_ahead - 1}", problem
        )
