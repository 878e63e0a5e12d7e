"""What each action waits for, and the lane it travels on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipestill.schedule import Action, Lane, Op, Structure
from pipestill.schedule.needs import lane, needs

BOTH = Structure((0, 1, 2), (0, 1, 2), 2)
ALONE = Structure((0, 1, 2), (), 2)
SERIAL = Structure((0, 1, 2), (0, 1, 2), 2, serial=True)
VALIDATION = Structure((0, 1, 2), (), 2, train=False)


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
        (BOTH, "S1F1@4>2", "S1F1@4"),
        (BOTH, "S1F1@4<1", "S0D@4"),
        (BOTH, "S0D@4>1", "S0D@4"),
        (BOTH, "S0D@4<0", ""),
    ],
)
def test_needs(structure: Structure, action: str, expected: str) -> None:
    assert " ".join(map(str, needs(Action.parse(action), structure))) == expected


def structures() -> st.SearchStrategy[Structure]:
    def build(students: int, teachers: int, microbatches: int, serial: bool, train: bool) -> Structure:
        return Structure(tuple(range(students)), tuple(range(teachers)), microbatches, serial, train)

    return st.builds(build, st.integers(1, 4), st.integers(0, 4), st.integers(1, 4), st.booleans(), st.booleans())


@given(structures())
def test_a_plain_loop_meets_every_need(structure: Structure) -> None:
    """The order of `Structure.actions` is one in which every need is met, and the actions are all there is to need."""
    done = set[Action]()
    for step in range(3):
        for action in structure.actions(step):
            wanted = needs(action, structure)
            assert len(wanted) == len(set(wanted))
            assert all(need in done or need.step < 0 for need in wanted)
            done.add(action)


@given(structures())
def test_every_result_is_needed(structure: Structure) -> None:
    """Nothing is computed in vain: all work leads to the next update, or to the loss of a validation."""
    wanted = {need for step in (0, 1) for action in structure.actions(step) for need in needs(action, structure)}
    ends = {Op.LOSS} if not structure.train else {Op.UPDATE}
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
    ],
)
def test_lanes(transfer: str, destination: int, expected: Lane) -> None:
    assert lane(Action.parse(transfer), destination, SERIAL) is expected
