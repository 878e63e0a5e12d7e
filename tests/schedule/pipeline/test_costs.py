"""How long each action and each transfer of a pipeline takes."""

from dataclasses import replace

import pytest

from pipestill.costs import Link, StageCosts
from pipestill.schedule import Action, PipelineStructure

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
    costs = StageCosts(
        (1.0, 2.0), (3.0, 4.0), (5.0, 6.0), (7.0, 8.0), loss=9.0, data=10.0, weight=(0.5, 1.5), ema=(11.0, 12.0)
    )
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
        ("S0D@0", 0.0),
        ("S2N@0", 0.0),
    ],
)
def test_seconds_of_each_kind_of_transfer(action: str, seconds: float) -> None:
    """A gradient is as large as the activation that it belongs to: the one before its stage."""
    costs = StageCosts(*[(1.0,) * 3] * 4, activation_bytes=(1, 2, 3), teacher_bytes=(4, 5, 6), link=Link(0.0, 1.0))
    assert PipelineStructure((0, 1, 2), (0, 1, 2), 1).transfer_seconds(Action.parse(action), 0, costs) == seconds


def test_seconds_of_a_transfer_in_each_view_and_piece() -> None:
    """A view that takes half as long is half as large."""
    ones = (1.0, 1.0)
    costs = StageCosts(*[ones] * 4, activation_bytes=(8, 8), link=Link(0.25, 1.0), views=(1.0, 0.5))
    structure = PipelineStructure((0, 1), (0, 1), 2, views=2)
    seconds = [structure.transfer_seconds(Action.parse(f"S0F{u}@0"), 0, costs) for u in range(4)]
    assert seconds == [8.25, 4.25, 8.25, 4.25]
    halves = replace(structure, pieces=2)
    assert [halves.transfer_seconds(Action.parse(f"S1B{u}@0"), 0, costs) for u in range(2)] == [4.25, 2.25]
