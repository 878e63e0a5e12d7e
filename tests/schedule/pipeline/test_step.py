"""What one step of a pipeline computes, in the order of a plain loop."""

from typing import Any

import pytest
from schedule.tasks import texts_of

from pipestill.schedule import Action, Op, PipelineStructure, Role


def test_actions_stand_in_the_order_of_a_plain_loop() -> None:
    structure = PipelineStructure((0, 1), (1, 0), 2)
    assert " ".join(map(str, structure.actions(step=3))) == (
        "S0D@3 T0F0@3 T1F0@3 S0F0@3 S1F0@3 S1L0@3 S1B0@3 S0B0@3 T0F1@3 T1F1@3 S0F1@3 S1F1@3 S1L1@3 S1B1@3 S0B1@3 S0U@3 S1U@3"
    )


def test_forward_only_has_no_gradients() -> None:
    structure = PipelineStructure((0, 1), (), 1, train=False)
    assert " ".join(map(str, structure.actions())) == "S0D@0 S0F0@0 S1F0@0 S1L0@0"


def test_placement() -> None:
    structure = PipelineStructure(student_ranks=(2, 0), teacher_ranks=(1, 0, 0), num_microbatches=1)
    assert structure.num_ranks == 3
    assert structure.last == 1
    assert structure.rank_of(Action.parse("S0B0@0")) == 2
    assert structure.rank_of(Action.parse("T0F0@0>2")) == 1
    assert structure.stages_of(0, Role.TEACHER) == [1, 2]
    assert structure.stages_of(0, Role.STUDENT) == [1]
    assert structure.stages_of(1, Role.STUDENT) == []


@pytest.mark.parametrize(("ranks", "microbatches"), [((), 1), ((0,), 0), ((0,), -2)])
def test_structure_without_work(ranks: tuple[int, ...], microbatches: int) -> None:
    with pytest.raises(ValueError, match="at least one student stage and one microbatch"):
        PipelineStructure(ranks, (), microbatches)


def test_backwards_in_two_halves() -> None:
    structure = PipelineStructure((0, 1), (), 1, split=True)
    assert " ".join(map(str, structure.actions())) == "S0D@0 S0F0@0 S1F0@0 S1L0@0 S1I0@0 S1W0@0 S0I0@0 S0W0@0 S0U@0 S1U@0"
    assert structure.backward_ops == (Op.INPUT, Op.WEIGHT)
    assert PipelineStructure((0,), (), 1).backward_ops == (Op.BACKWARD,)


def test_what_ends_a_step_of_a_momentum_teacher() -> None:
    structure = PipelineStructure((0, 1), (0, 1), 1, momentum=True, clip=True)
    assert " ".join(map(str, structure.actions(step=2))) == (
        "S0D@2 T0F0@2 T1F0@2 S0F0@2 S1F0@2 S1L0@2 S1B0@2 S0B0@2 S0N@2 S1N@2 S0U@2 T0E@2 S1U@2 T1E@2"
    )


def test_views_of_a_microbatch_share_its_loss() -> None:
    structure = PipelineStructure((0,), (0,), 2, views=2, teacher_views=1)
    assert texts_of([list(structure.actions())]) == [
        "S0D@0 T0F0@0 S0F0@0 S0F1@0 S0L0@0 S0B0@0 S0B1@0 T0F1@0 S0F2@0 S0F3@0 S0L1@0 S0B2@0 S0B3@0 S0U@0"
    ]
    assert (structure.num_units(Role.STUDENT), structure.num_units(Role.TEACHER), structure.num_losses) == (4, 2, 2)
    assert [structure.loss_of_unit(u) for u in range(4)] == [0, 0, 1, 1]
    assert structure.units_of_loss(1, Role.STUDENT) == range(2, 4)
    assert structure.units_of_loss(1, Role.TEACHER) == range(1, 2)


def test_a_loss_over_the_batch_comes_once() -> None:
    structure = PipelineStructure((0,), (0,), 2, views=2, teacher_views=1, batch_loss=True)
    assert texts_of([list(structure.actions())]) == [
        "S0D@0 T0F0@0 S0F0@0 S0F1@0 T0F1@0 S0F2@0 S0F3@0 S0L0@0 S0B0@0 S0B1@0 S0B2@0 S0B3@0 S0U@0"
    ]
    assert structure.num_losses == 1
    assert {structure.loss_of_unit(u) for u in range(4)} == {0}
    assert structure.units_of_loss(0, Role.TEACHER) == range(2)


def test_a_stage_with_features_has_a_loss() -> None:
    structure = PipelineStructure((0, 1, 2), (0, 1, 2), 1, features=((1, 0), (1, 2)))
    assert texts_of([list(structure.actions())]) == [
        "S0D@0 T0F0@0 T1F0@0 T2F0@0 S0F0@0 S1F0@0 S2F0@0 S1L0@0 S2L0@0 S2B0@0 S1B0@0 S0B0@0 S0U@0 S1U@0 S2U@0"
    ]
    assert [structure.taught_by(stage) for stage in range(3)] == [[], [0, 2], [2]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pieces": 2}, "3 microbatches are no multiple of 2 pieces"),
        ({"pieces": 0}, "3 microbatches are no multiple of 0 pieces"),
        ({"views": 0}, "a teacher that sees 1 of 0 views; expected 1 to all"),
        ({"views": 2, "teacher_views": 3}, "a teacher that sees 3 of 2 views; expected 1 to all"),
        ({"teacher_views": 0}, "a teacher that sees 0 of 1 views; expected 1 to all"),
        ({"teacher_ranks": (1, 0), "momentum": True}, "a momentum teacher's stages sit where the student's do"),
        ({"teacher_ranks": (), "momentum": True}, "a momentum teacher's stages sit where the student's do"),
        ({"momentum": True, "staleness": 2}, "staleness 2 and 0; expected 0 or 1"),
        ({"momentum": True, "student_staleness": -1}, "staleness 0 and -1; expected 0 or 1"),
        ({"staleness": 1}, "only a momentum teacher's weights, and then the student's, can be stale"),
        ({"features": ((2, 0),)}, "a feature of student stage 2 and teacher stage 0, which are not both there"),
        ({"features": ((1, 2),)}, "a feature of student stage 1 and teacher stage 2, which are not both there"),
        ({"student_staleness": 1}, "only a momentum teacher's weights, and then the student's, can be stale"),
    ],
)
def test_impossible_structure(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PipelineStructure(**{"student_ranks": (0, 1), "teacher_ranks": (0, 1), "num_microbatches": 3, **fields})


@pytest.mark.parametrize("ranks", [(1,), (0, 2), (-1, 0)])
def test_ranks_have_no_gaps(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"ranks \[.*\] are not 0 to"):
        PipelineStructure(ranks, (), 1)
