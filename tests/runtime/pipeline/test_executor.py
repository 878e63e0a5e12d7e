"""What runs is the schedule: nothing else, in no other order, and nothing stays behind."""

from typing import Any

import pytest
from support.cases import CASES, EVERYTHING
from support.fits import unit_costs
from support.models import vectors

import pipestill as ps
from pipestill.runtime.pipeline import rank as rank_module
from pipestill.runtime.pipeline.executor import PipelineExecutor
from pipestill.runtime.world import OneProcess
from pipestill.schedule import Lane, Op

PIPELINE_STRATEGIES = ("sequential", "gpipe", "1f1b", "fill")


def fit(strategy: str, rows: tuple[int, ...], devices: int = 3, microbatches: int = 4) -> Any:
    task = CASES["nothing_to_train_in_a_stage"].task()
    trainer = ps.Trainer(
        task, strategy=strategy, devices=devices, microbatches=microbatches, costs=unit_costs(task), device="cpu"
    )
    return trainer.fit(vectors(rows))


@pytest.mark.parametrize("strategy", PIPELINE_STRATEGIES)
def test_every_action_runs_once_and_in_order(strategy: str) -> None:
    result = fit(strategy, (8,) * 5)
    rows = result.plan.schedule.unroll(5)
    for rank, row in enumerate(rows):
        ran = [event.action for event in result.trace.events if event.rank == rank]
        assert ran == [action for action in row if action.computes and action.op is not Op.DATA]


@pytest.mark.parametrize("strategy", PIPELINE_STRATEGIES)
def test_empty_microbatches_are_left_out_by_all_ranks(strategy: str) -> None:
    result = fit(strategy, (8, 3, 8))
    short = {event.action.microbatch for event in result.trace.events if event.action.step == 1}
    assert short == {0, 1, 2, None}
    whole = {event.action.microbatch for event in result.trace.events if event.action.step == 2}
    assert whole == {0, 1, 2, 3, None}


@pytest.mark.parametrize("strategy", PIPELINE_STRATEGIES)
def test_no_more_is_stashed_than_the_schedule_allows(strategy: str) -> None:
    result = fit(strategy, (8,) * 5)
    assert all(a <= b for a, b in zip(result.trace.stash_peak, result.plan.schedule.stash, strict=True))


Kept = tuple[list[PipelineExecutor], list[OneProcess]]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """Every executor and world that a test makes."""
    executors: list[PipelineExecutor] = []
    worlds: list[OneProcess] = []

    class Remembered(PipelineExecutor):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            executors.append(self)

    def world(devices: int, *rest: Any, **more: Any) -> OneProcess:
        worlds.append(OneProcess(devices))
        return worlds[-1]

    monkeypatch.setattr(rank_module, "PipelineExecutor", Remembered)
    monkeypatch.setattr("pipestill.train.trainer.join_world", world)
    return executors, worlds


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize("strategy", PIPELINE_STRATEGIES)
@pytest.mark.parametrize("microbatches", [1, 3, 8])
def test_nothing_stays_behind(strategy: str, microbatches: int, kept: Kept) -> None:
    """Two epochs with a validation each: no message untaken, no result unused, no activation kept."""
    EVERYTHING.run(strategy, 3, microbatches=microbatches)
    executors, worlds = kept
    assert len(executors) == 3 + 2 * 3
    for executor in executors:
        assert not executor.mailbox.results
        assert len(executor.batches.known) <= 1 + executor.schedule.lookahead  # the end of the data
        assert executor.student is not None
        assert not executor.student.stash
        assert not executor.student.from_loss
        assert not executor.student.loss_sums.any()
    left = worlds[0]._boxes.items()  # nothing but the news, read ahead, that there is no more data
    assert all(message.lane is Lane.DATA and header[0] == 0 for message, (header,) in left)


def test_memory_does_not_grow_with_the_run(kept: Kept) -> None:
    result = fit("fill", (4,) * 60, microbatches=2)
    assert result.steps == 60
    executors, _ = kept
    assert max(len(executor.batches.known) for executor in executors) <= 3
    assert len({event.action.step for event in result.trace.events}) < 60
