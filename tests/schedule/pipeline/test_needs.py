"""What each action waits for, and the lane it travels on."""

from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from pipestill.schedule import Action, Lane, Op, PipelineStructure
from pipestill.schedule.structure import lane, needs

BOTH = PipelineStructure((0, 1, 2), (0, 1, 2), 2)
ALONE = PipelineStructure((0, 1, 2), (), 2)
SERIAL = PipelineStructure((0, 1, 2), (0, 1, 2), 2, serial=True)
VALIDATION = PipelineStructure((0, 1, 2), (), 2, train=False)
EMA = replace(BOTH, momentum=True)
STALE = replace(BOTH, momentum=True, staleness=1)
ASYNC = replace(BOTH, momentum=True, staleness=1, student_staleness=1)
SPLIT = replace(BOTH, split=True)
CLIP = replace(BOTH, clip=True)
VIEWS = replace(BOTH, views=2, teacher_views=1)
WHOLE = replace(VIEWS, batch_loss=True)
SERIAL_VIEWS = replace(SERIAL, views=2, teacher_views=2)
SERIAL_WHOLE = replace(SERIAL, batch_loss=True)
FEATURES = replace(BOTH, features=((0, 2), (0, 1), (2, 0), (0, 1)))


@pytest.mark.parametrize(
    ("structure", "action", "expected"),
    [
        (BOTH, "S0D@4", "S0D@3"),
        (BOTH, "T0F1@4", "S0D@4"),
        (BOTH, "T2F1@4", "S0D@4 T1F1@4"),
        (BOTH, "S0F1@4", "S0D@4 S0U@3"),
        (BOTH, "S1F1@4", "S0D@4 S0F1@4 S1U@3"),
        (BOTH, "S2L1@4", "S0D@4 T2F1@4 S2F1@4"),
        (ALONE, "S2L1@4", "S0D@4 S2F1@4"),
        (BOTH, "S2B1@4", "S2F1@4 S2L1@4"),
        (BOTH, "S0B1@4", "S0F1@4 S1B1@4"),
        (BOTH, "S1U@4", "S1B0@4 S1B1@4"),
        (SERIAL, "S0F1@4", "S0D@4 T2F1@4 S0U@3"),
        (SERIAL, "S1F1@4", "S0D@4 S0F1@4 S1U@3"),
        (VALIDATION, "S1F1@4", "S0D@4 S0F1@4"),
        (FEATURES, "S0L1@4", "S0D@4 T1F1@4 T2F1@4 S0F1@4"),
        (FEATURES, "S2L1@4", "S0D@4 T0F1@4 T2F1@4 S2F1@4"),
        (FEATURES, "S0B1@4", "S0F1@4 S0L1@4 S1B1@4"),
        (FEATURES, "S1B1@4", "S1F1@4 S2B1@4"),
        (replace(FEATURES, split=True, batch_loss=True), "S0I1@4", "S0F1@4 S0L0@4 S1I1@4"),
        (replace(FEATURES, batch_loss=True), "S0L0@4", "S0D@4 T1F0@4 T1F1@4 T2F0@4 T2F1@4 S0F0@4 S0F1@4"),
        # a momentum teacher
        (EMA, "T0F1@4", "S0D@4 T0E@3"),
        (EMA, "T2F1@4", "S0D@4 T1F1@4 T2E@3"),
        (EMA, "S1F1@4", "S0D@4 S0F1@4 S1U@3"),
        (EMA, "T1E@4", "S1U@4 T1E@3"),
        (STALE, "T1F1@4", "S0D@4 T0F1@4 T1E@2"),
        (STALE, "S1F1@4", "S0D@4 S0F1@4 S1U@3"),
        (STALE, "T1E@4", "S1U@4 T1E@3"),
        (ASYNC, "T1F1@4", "S0D@4 T0F1@4 T1E@2"),
        (ASYNC, "S1F1@4", "S0D@4 S0F1@4 S1U@2"),
        (ASYNC, "S1U@4", "S1B0@4 S1B1@4 S1U@3"),
        (replace(ASYNC, clip=True), "S1U@4", "S0N@4 S1N@4 S2N@4 S1U@3"),
        # backwards in two halves
        (SPLIT, "S2I1@4", "S2F1@4 S2L1@4"),
        (SPLIT, "S0I1@4", "S0F1@4 S1I1@4"),
        (SPLIT, "S1W1@4", "S1I1@4"),
        (SPLIT, "S1U@4", "S1W0@4 S1W1@4"),
        (replace(SPLIT, clip=True), "S1N@4", "S1W0@4 S1W1@4"),
        # clipping by the norm of all gradients
        (CLIP, "S1N@4", "S1B0@4 S1B1@4"),
        (CLIP, "S1U@4", "S0N@4 S1N@4 S2N@4"),
        # several views: units 2 and 3 of the student are microbatch 1, of which the teacher sees one view
        (VIEWS, "S2L1@4", "S0D@4 T2F1@4 S2F2@4 S2F3@4"),
        (VIEWS, "S2B3@4", "S2F3@4 S2L1@4"),
        (VIEWS, "S1U@4", "S1B0@4 S1B1@4 S1B2@4 S1B3@4"),
        (WHOLE, "S2L0@4", "S0D@4 T2F0@4 T2F1@4 S2F0@4 S2F1@4 S2F2@4 S2F3@4"),
        (WHOLE, "S2B3@4", "S2F3@4 S2L0@4"),
        (SERIAL_VIEWS, "T0F1@4", "S0D@4 T2F0@4"),
        (SERIAL_VIEWS, "S0F0@4", "S0D@4 T2F1@4 S0U@3"),
        (SERIAL_VIEWS, "S0F1@4", "S0D@4 S2F0@4 S0U@3"),
        (SERIAL_VIEWS, "S2B1@4", "S2F1@4 S2L0@4 S0B0@4"),
        (SERIAL_VIEWS, "T0F2@4", "S0D@4 S0B1@4"),
        (SERIAL_WHOLE, "T0F1@4", "S0D@4 S2F0@4"),
        (SERIAL_WHOLE, "S2B0@4", "S2F0@4 S2L0@4 S2F1@4"),
        # transfers
        (CLIP, "S1N@4>2", "S1N@4"),
        (CLIP, "S1N@4<1", "S0D@4"),
        (SPLIT, "S1I1@4>0", "S1I1@4"),
        (BOTH, "S1F1@4>2", "S1F1@4"),
        (BOTH, "S1F1@4<1", "S0D@4"),
        (BOTH, "S0D@4>1", "S0D@4"),
        (BOTH, "S0D@4<0", ""),
    ],
)
def test_needs(structure: PipelineStructure, action: str, expected: str) -> None:
    assert " ".join(map(str, needs(Action.parse(action), structure))) == expected


@st.composite
def structures(draw: st.DrawFn) -> PipelineStructure:
    students = tuple(range(draw(st.integers(1, 4))))
    momentum, views = draw(st.booleans()), draw(st.integers(1, 3))
    teachers = students if momentum else tuple(range(draw(st.integers(0, 4))))
    pairs = st.lists(st.tuples(st.sampled_from(students), st.sampled_from(teachers)), max_size=3) if teachers else st.just(())
    return PipelineStructure(
        students,
        teachers,
        num_microbatches=draw(st.integers(1, 4)),
        serial=draw(st.booleans()),
        train=momentum or draw(st.booleans()),
        views=views,
        teacher_views=draw(st.integers(1, views)),
        batch_loss=draw(st.booleans()),
        momentum=momentum,
        staleness=draw(st.integers(0, int(momentum))),
        student_staleness=draw(st.integers(0, int(momentum))),
        split=draw(st.booleans()),
        clip=draw(st.booleans()),
        features=tuple(draw(pairs)),
    )


@given(structures())
def test_a_plain_loop_meets_every_need(structure: PipelineStructure) -> None:
    """The order of `PipelineStructure.actions` is one in which every need is met, and the actions are all there is to need."""
    done = set[Action]()
    for step in range(3):
        for action in structure.actions(step):
            wanted = needs(action, structure)
            assert len(wanted) == len(set(wanted))
            assert all(need in done or need.step < 0 for need in wanted)
            done.add(action)


@given(structures())
def test_every_result_is_needed(structure: PipelineStructure) -> None:
    """Nothing is computed in vain: all work leads to the next update, or to the loss of a validation."""
    wanted = {need for step in (0, 1) for action in structure.actions(step) for need in needs(action, structure)}
    ends = {Op.LOSS} if not structure.train else {Op.UPDATE, Op.EMA}
    for action in structure.actions(0):
        assert action in wanted or action.op in ends


@pytest.mark.parametrize(
    ("transfer", "destination", "expected"),
    [
        ("S0D@0>1", 1, Lane.DATA),
        ("S0F0@0>1", 1, Lane.ACTIVATION),
        ("S1B0@0>0", 0, Lane.GRADIENT),
        ("T0F0@0>1", 1, Lane.TEACHER),
        ("T2F0@0>2", 2, Lane.TEACHER),
        ("T2F0@0>0", 0, Lane.TOKEN),
        ("T2F0@0<2", 0, Lane.TOKEN),
        ("S2F0@0>0", 0, Lane.TOKEN),  # only tells that a pass has ended
        ("S0B0@0>2", 2, Lane.TOKEN),
        ("S0I0@0>2", 2, Lane.TOKEN),
        ("S1I0@0>0", 0, Lane.GRADIENT),
        ("S1I0@0<1", 0, Lane.GRADIENT),
        ("S1N@0>0", 0, Lane.NORM),
        ("S0N@0<0", 2, Lane.NORM),
    ],
)
def test_lanes(transfer: str, destination: int, expected: Lane) -> None:
    assert lane(Action.parse(transfer), destination, SERIAL) is expected


def test_features_travel_on_the_lane_of_the_teacher() -> None:
    """Also where the last stage's forward only tells others that a pass has ended, but for features."""
    serial = replace(SERIAL, features=((0, 2), (2, 0)))
    lanes = [lane(Action.parse(text), rank, serial) for text, rank in (("T2F0@0", 0), ("T0F0@0", 2), ("T2F0@0", 1))]
    assert lanes == [Lane.TEACHER, Lane.TEACHER, Lane.TOKEN]


def test_gradients_of_two_steps_never_mix() -> None:
    """Asynchronous forwards run before the last step's update, but its gradients and losses are taken by it first."""
    update = Action.parse("S2U@3")
    assert update in needs(Action.parse("S2L1@4"), ASYNC)  # which the last stage's backwards need
    assert Action.parse("S1U@3") in needs(Action.parse("S1B1@4"), ASYNC)
    assert update not in needs(Action.parse("S2F1@4"), ASYNC)
    assert update not in needs(Action.parse("S2L1@4"), BOTH)  # there the forward has waited for it
