"""Actions print, parse and refuse what makes no sense."""

import pytest
from hypothesis import given, strategies as st

from pipestill.schedule import Action, Kind, Op, Role

number = st.integers(0, 999_999_999)


@st.composite
def actions(draw: st.DrawFn) -> Action:
    role = draw(st.sampled_from(Role))
    of_teacher = {Op.FORWARD, Op.EMA}
    op = draw(st.sampled_from(sorted(of_teacher if role is Role.TEACHER else {*Op} - {Op.EMA})))
    kind = draw(st.sampled_from(Kind))
    return Action(
        role,
        stage=draw(number),
        op=op,
        microbatch=draw(number) if op.per_microbatch else None,
        step=draw(number),
        kind=kind,
        peer=None if kind is Kind.COMPUTE else draw(number),
    )


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("S2F0@1", Action(Role.STUDENT, 2, Op.FORWARD, 0, 1)),
        ("T0F3@2", Action(Role.TEACHER, 0, Op.FORWARD, 3, 2)),
        ("S0D@7", Action(Role.STUDENT, 0, Op.DATA, None, 7)),
        ("S1L5@0", Action(Role.STUDENT, 1, Op.LOSS, 5, 0)),
        ("S10B11@12", Action(Role.STUDENT, 10, Op.BACKWARD, 11, 12)),
        ("S1U@4", Action(Role.STUDENT, 1, Op.UPDATE, None, 4)),
        ("S1U2@4", Action(Role.STUDENT, 1, Op.UPDATE, 2, 4)),
        ("S2R1@0", Action(Role.STUDENT, 2, Op.REDUCE, 1, 0)),
        ("S2I0@1", Action(Role.STUDENT, 2, Op.INPUT, 0, 1)),
        ("S2W10@1", Action(Role.STUDENT, 2, Op.WEIGHT, 10, 1)),
        ("S1N@4", Action(Role.STUDENT, 1, Op.NORM, None, 4)),
        ("T1E@4", Action(Role.TEACHER, 1, Op.EMA, None, 4)),
        ("S1N@4>0", Action(Role.STUDENT, 1, Op.NORM, None, 4, Kind.SEND, 0)),
        ("S2I0@1<3", Action(Role.STUDENT, 2, Op.INPUT, 0, 1, Kind.RECEIVE, 3)),
        ("S2F0@1>3", Action(Role.STUDENT, 2, Op.FORWARD, 0, 1, Kind.SEND, 3)),
        ("S2F0@1<2", Action(Role.STUDENT, 2, Op.FORWARD, 0, 1, Kind.RECEIVE, 2)),
    ],
)
def test_text(text: str, action: Action) -> None:
    assert str(action) == text
    assert Action.parse(text) == action


@given(actions())
def test_text_round_trip(action: Action) -> None:
    assert Action.parse(str(action)) == action


@given(st.text() | st.from_regex(r"[STX][0-9]{1,2}[DFLBIWRNUEX][0-9]{0,2}@-?[0-9]{1,2}([<>][0-9]?)?\n?", fullmatch=True))
def test_what_parses_is_what_prints(text: str) -> None:
    try:
        action = Action.parse(text)
    except ValueError as error:
        assert repr(text)[1:-1] in str(error) or text in str(error)  # noqa: PT017 - the other branch is a success
    else:
        assert str(action) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "S2F0",  # no step
        "S2F0@",
        "F0@1",  # no stage
        "SF0@1",
        "X2F0@1",  # no such role
        "S2X0@1",  # no such op
        "S2F0@1>",  # a transfer to nowhere
        "S2F0@1>2<3",
        "S2F0@-1",
        "S-2F0@1",
        " S2F0@1",
        "S2F0@1 ",
        "S2F0@1\n",
        "s2f0@1",
        "S02F0@1",  # prints as S2F0@1
        "S2F0@01",
        "S\u0662F0@1",  # a digit, but not one of ours
        "S2F0@1.5",
        "S2F0@9999999999",
        "S2F0@1 S2F1@1",
    ],
)
def test_text_that_is_no_action(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not an action; expected something like S2F0@1, S1U@4 or S2F0@1>3"):
        Action.parse(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("S2F@1", "op FORWARD needs microbatch"),
        ("S2R@1", "op REDUCE needs microbatch"),
        ("T2R0@1", "the teacher only runs forward and moves its weights, not REDUCE"),
        ("S2D0@1", "op DATA takes no microbatch"),
        ("S2W@1", "op WEIGHT needs microbatch"),
        ("S2N0@1", "op NORM takes no microbatch"),
        ("T2E0@1", "op EMA takes no microbatch"),
        ("T2B0@1", "the teacher only runs forward and moves its weights, not BACKWARD"),
        ("T2I0@1", "the teacher only runs forward and moves its weights, not INPUT"),
        ("T2U@1", "the teacher only runs forward and moves its weights, not UPDATE"),
        ("S2E@1", "only the teacher's weights are an average of others"),
    ],
)
def test_text_of_an_impossible_action(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}' is not an action: {reason}"):
        Action.parse(text)


def test_exactly_transfers_name_a_peer() -> None:
    with pytest.raises(ValueError, match="exactly the transfers name a peer"):
        Action(Role.STUDENT, 0, Op.FORWARD, 0, 0, peer=1)
    with pytest.raises(ValueError, match="exactly the transfers name a peer"):
        Action(Role.STUDENT, 0, Op.FORWARD, 0, 0, Kind.SEND)


@given(actions(), number, number)
def test_transfers_of_a_work(action: Action, rank: int, step: int) -> None:
    work = action.payload
    assert work.computes
    assert work.payload == work
    assert str(work.send_to(rank)) == f"{work}>{rank}"
    assert str(work.receive_from(rank)) == f"{work}<{rank}"
    assert work.send_to(rank).payload == work.receive_from(rank).payload == work
    assert action.at(step).step == step
    assert action.at(step).at(action.step) == action


def test_ops_of_a_microbatch() -> None:
    assert {op for op in Op if op.per_microbatch} == {
        Op.FORWARD, Op.LOSS, Op.BACKWARD, Op.INPUT, Op.WEIGHT, Op.REDUCE
    }  # fmt: skip
