"""What is true of the needs of every kind of training: transfers, reads of the data, and what crosses ranks."""

import pytest
from schedule.blockwise.tasks import HYBRID

from pipestill.schedule import Action, Lane, Op, PipelineStructure, Structure
from pipestill.schedule.blockwise.generate import staged
from pipestill.schedule.structure import crossings, lane, meets, needs

PIPELINE = PipelineStructure((0, 1), (0, 1), 2)
BLOCKWISE = staged("hybrid", HYBRID).structure


@pytest.mark.parametrize("structure", [PIPELINE, BLOCKWISE], ids=["pipeline", "blockwise"])
@pytest.mark.parametrize(
    ("action", "expected"),
    [("S0D@4", "S0D@3"), ("S0D@4>1", "S0D@4"), ("S0D@4<0", ""), ("T0F1@4>2", "T0F1@4"), ("T0F1@4<0", "S0D@4")],
)
def test_transfers_and_reads_of_the_data(structure: Structure, action: str, expected: str) -> None:
    """A receive waits for the data, whose row counts size its buffer; the reads stand in their order."""
    assert " ".join(map(str, needs(Action.parse(action), structure))) == expected
    if action.startswith("S0D@4") and action != "S0D@4":
        assert lane(Action.parse(action), 1, structure) is Lane.DATA


def test_gradients_that_ranks_add_up_meet_in_a_collective() -> None:
    assert [str(a) for a in BLOCKWISE.actions() if meets(a)] == ["S0R0@0", "S0R1@0"]
    assert not [payload for payload, _, _ in crossings(BLOCKWISE) if payload.role == "S" and payload.op is Op.BACKWARD]


def test_crossings_are_each_named_once() -> None:
    structure = PipelineStructure((0, 1), (0, 1), 1)
    assert [(str(a), source, destination) for a, source, destination in crossings(structure)] == [
        ("S0D@0", 0, 1),
        ("T0F0@0", 0, 1),
        ("S0F0@0", 0, 1),
        ("S1B0@0", 1, 0),
    ]


def test_norms_go_to_every_other_stage() -> None:
    structure = PipelineStructure((0, 1, 2), (), 1, clip=True)
    norms = [(str(a), source, to) for a, source, to in crossings(structure) if a.op is Op.NORM]
    assert sorted(norms) == [
        *[("S0N@0", 0, 1), ("S0N@0", 0, 2), ("S1N@0", 1, 0)],
        *[("S1N@0", 1, 2), ("S2N@0", 2, 0), ("S2N@0", 2, 1)],
    ]
