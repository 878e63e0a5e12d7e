"""What one step of blockwise training computes, and which rows flow where."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from schedule.blockwise.tasks import sliced_schedules

from pipestill.schedule import Action, Op, Role, Schedule
from pipestill.schedule.blockwise.shares import Share, equal_shares, rows_of_part
from pipestill.schedule.blockwise.structure import BlockwiseStructure

HALVES = (Fraction(0), Fraction(1, 2)), (Fraction(1, 2), Fraction(1))


def two_groups(first: int, second: int) -> BlockwiseStructure:
    """Block 0 on `first` ranks, block 1 on `second` others."""
    shares = equal_shares(range(first)), equal_shares(range(first, first + second))
    return BlockwiseStructure(first + second, 1, shares, shares)


@pytest.mark.parametrize("second", range(1, 6))
@pytest.mark.parametrize("first", range(1, 6))
def test_relays_between_groups_of_any_two_sizes_are_the_identity_on_rows(first: int, second: int) -> None:
    """Source i of k sends destination j of m the rows [iB/k, (i+1)B/k) ∩ [jB/m, (j+1)B/m) (Pipe-BD, Jang et al. 2023)."""
    structure = two_groups(first, second)
    for batch in range(31):
        for unit, share in enumerate(structure.teacher[1]):
            came = list[int]()
            for source in structure.sources(0, share):
                forward = Action(Role.TEACHER, 0, Op.FORWARD, source, 0)
                sent = rows_of_part(structure.relays[forward, share.rank], batch)
                expected = (
                    max(Fraction(source, first), Fraction(unit, second)),
                    min(Fraction(source + 1, first), Fraction(unit + 1, second)),
                )
                assert sent == rows_of_part(expected, batch)
                came += range(batch)[sent]
            assert came == list(range(batch)[rows_of_part(share.part, batch)])
        assert [r for s in structure.teacher[1] for r in range(batch)[rows_of_part(s.part, batch)]] == [*range(batch)]


@given(sliced_schedules())
@settings(deadline=None, max_examples=20)
def test_all_rows_that_work_takes_are_there_once(schedule: Schedule) -> None:
    """Each comes from the rank itself, or with a relay that brings it."""
    structure = schedule.structure
    for action in structure.actions():
        if action.op not in (Op.FORWARD, Op.BACKWARD):
            continue
        share = structure.share_of(action)
        for block in structure.reads(action.role, action.stage):
            parts = []
            for unit in structure.sources(block, share) if block >= 0 else ():
                forward, source = Action(Role.TEACHER, block, Op.FORWARD, unit, 0), structure.teacher[block][unit]
                assert source.batch == share.batch
                part = max(source.part[0], share.part[0]), min(source.part[1], share.part[1])
                if source.rank != share.rank:
                    relayed = structure.relays[forward, share.rank]
                    assert source.part[0] <= relayed[0] <= part[0] and part[1] <= relayed[1] <= source.part[1]
                parts.append(part)
            edges = [share.part[0], *(edge for part in sorted(parts) for edge in part), share.part[1]]
            assert block < 0 or edges[::2] == edges[1::2]


def test_an_output_on_the_own_rank_is_taken_from_there() -> None:
    shares = equal_shares(range(2))
    structure = BlockwiseStructure(2, 1, (shares,), (shares,))
    assert structure.sources(0, shares[1]) == [1]
    assert structure.sources(0, Share(0, 1)) == [0, 1]  # the second half alone is not enough
    assert structure.relays == {}


def test_actions_stand_in_the_order_of_a_plain_loop() -> None:
    structure = two_groups(1, 2)
    assert " ".join(map(str, structure.actions(step=3))) == (
        "S0D@3 T0F0@3 T1F0@3 T1F1@3 S0B0@3 S0U0@3 S1B0@3 S1B1@3 S1R0@3 S1R1@3 S1U0@3 S1U1@3"
    )
    assert [structure.rank_of(a) for a in structure.actions()] == [0, 0, 1, 2, 0, 0, 1, 2, 1, 2, 1, 2]
    assert structure.stages_of(2, Role.TEACHER) == structure.stages_of(2, Role.STUDENT) == [1]
    assert (structure.num_blocks, structure.window) == (2, 1)


def test_a_block_that_is_not_trained_has_no_steps() -> None:
    shares = equal_shares([0])
    structure = BlockwiseStructure(1, 1, (shares, shares), ((), shares))
    assert " ".join(map(str, structure.actions())) == "S0D@0 T0F0@0 T1F0@0 S1B0@0 S1U0@0"


def test_a_block_moves_where_its_next_batch_is_trained() -> None:
    """Batch 0 on rank 0, batches 1 and 2 on rank 1, and back to rank 0 for the next window."""
    student = (Share(0, 0), Share(1, 1), Share(2, 1))
    structure = BlockwiseStructure(2, 3, (tuple(Share(b, 0) for b in range(3)),), (student,))
    before = [structure.before(Action.parse(f"S0B{u}@5")) for u in range(3)]
    assert list(map(str, before)) == ["S0U2@4", "S0U0@5", "S0U1@5"]
    moves = {(str(update), rank) for update, rank in structure.moves}
    assert moves == {("S0U0@0", 1), ("S0U2@0", 0)}


def test_a_block_that_is_shared_moves_from_one_of_its_ranks() -> None:
    """Both have the same weights after an update, so that only a rank that had no part in it is sent any."""
    halves = tuple(Share(1, rank, part) for rank, part in enumerate(HALVES))
    structure = BlockwiseStructure(3, 3, ((Share(0, 2), *halves, Share(2, 2)),), ((Share(0, 2), *halves, Share(2, 2)),))
    moves = {(str(update), rank) for update, rank in structure.moves}
    assert moves == {("S0U0@0", 0), ("S0U0@0", 1), ("S0U1@0", 2)}


def test_receipts_are_the_last_uses_of_a_relay() -> None:
    """Rank 1 takes block 0's output through the teacher's block 1 and its student's, of which the latter ends later."""
    structure = two_groups(1, 1)
    assert {str(source): list(map(str, ends)) for source, ends in structure.receipts.items()} == {"T0F0@0": ["S1U0@0"]}


ONE = equal_shares([0])

TWO = equal_shares([0, 1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": ()}, "0 teacher and 1 student blocks; expected as many of both"),
        ({"student": (ONE, ONE)}, "1 teacher and 2 student blocks"),
        ({"window": 0}, "a window of 0 batches, 1 steps ahead; expected at least 1 and 0"),
        ({"ahead": -1}, "a window of 1 batches, -1 steps ahead"),
        ({"student": ((Share(0, 2),),)}, "share 0@2 for 2 ranks and a window of 1 batches"),
        ({"student": ((Share(0, 0), Share(1, 0)),)}, "share 1@0 for 2 ranks and a window of 1 batches"),
        ({"window": 2, "student": ((Share(1, 0), Share(0, 0)),)}, "shares of a block are not in the order of their batches"),
        ({"window": 2}, "the shares of student block 0 are not all rows of batch 1 once"),
        ({"student": (TWO[:1],)}, "the shares of student block 0 are not all rows of batch 0 once"),
        ({"student": ((*ONE, *TWO[1:]),)}, "the shares of student block 0 are not all rows of batch 0 once"),
        (
            {"student": ((Share(0, 1, HALVES[0]), Share(0, 1, HALVES[1])),)},
            "a rank has several shares of one batch of student block 0; expected one",
        ),
        ({"teacher": (ONE,), "student": (ONE,)}, "2 ranks, of which 1 have nothing to do"),
        ({"num_ranks": 4}, "4 ranks, of which 2, 3 have nothing to do"),
        (
            {"teacher": (TWO[:1],), "student": (TWO,)},
            "teacher block 0 does not have all rows once that student block 0 takes of batch 0 on rank 1",
        ),
        (
            {"teacher": (TWO[1:], ONE), "student": ((), ())},
            "teacher block 0 does not have all rows once that teacher block 1 takes of batch 0 on rank 0",
        ),
    ],
)
def test_impossible_structure(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockwiseStructure(**{"num_ranks": 2, "window": 1, "teacher": (TWO,), "student": (TWO,), **fields})


def test_blocks_with_the_same_rows_twice_elsewhere_are_refused() -> None:
    """Whose are they to be? On a rank that has them itself there is no question."""
    everywhere = Share(0, 0), Share(0, 1)
    BlockwiseStructure(2, 1, (everywhere, everywhere), ((), ONE))
    with pytest.raises(ValueError, match="teacher block 0 does not have all rows once that student block 0 takes"):
        BlockwiseStructure(3, 1, (everywhere,), ((Share(0, 2),),))
