"""The text, the labels and the lanes of the batch of a pipeline's structure."""

from dataclasses import replace

import pytest

from pipestill.schedule import Action, Lane, PipelineStructure
from pipestill.schedule.pipeline.structure import pipeline

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


def test_only_the_rank_of_the_loss_is_sent_targets() -> None:
    lanes = [EVERYTHING.batch_lane(rank) for rank in (0, 1)]
    assert lanes == [None, Lane.TARGET]


def test_no_two_ranks_share_work() -> None:
    assert all(EVERYTHING.sharers(a) == [] for a in EVERYTHING.actions())
    assert (EVERYTHING.by_block, EVERYTHING.batches_per_step) == (False, 1)
    assert replace(EVERYTHING, split=False).backward_ops == (Action.parse("S0B0@0").op,)
