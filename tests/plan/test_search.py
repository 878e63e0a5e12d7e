"""What a search considers, and what it chooses."""

from typing import Any

import pytest

from pipestill.costs import Costs, Link
from pipestill.errors import PlanError
from pipestill.plan import make_plan, search as search_module
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES
from pipestill.plan.search import search_blockwise, search_pipelines
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes
from pipestill.schedule.pipeline.structure import Demands

FROZEN = Costs.uniform(4, 1, 1, 2, weight=1)
MOMENTUM, TWO_VIEWS = Demands(True, 2, 2), Costs.uniform(4, 1, 1, 2, weight=1, views=2)
EXACT = ["sequential", "gpipe", "1f1b", "fill", "fill, stash all", "fill+split, stash n", "fill+split", "fill+split, stash all"]
UNEVEN = BlockProfile(
    tuple(
        BlockTimes(f"b{i}", (4, 8, 16), tuple(0.1 * n * (1 + rows / 16) for rows in (4, 8, 16)),
                   tuple(0.2 * n * (1 + rows / 16) for rows in (4, 8, 16)), 100, 1000, 2000, 4000, 300)
        for i, n in enumerate((3, 1, 2, 1))
    )
)  # fmt: skip


def test_a_frozen_teacher_is_exact_under_every_strategy_and_the_fastest_is_chosen() -> None:
    found = search_pipelines(FROZEN, Demands(), devices=4, microbatches=8)
    names = [one.name for one in found.considered]
    assert sorted(names) == sorted([*EXACT, "tspipe"])
    plans = [one.plan for one in found.considered if one.plan is not None]
    assert len(plans) == len(names)
    assert found.plan.prediction.seconds_per_step == min(plan.prediction.seconds_per_step for plan in plans) == 32
    assert found.chosen.name == "fill+split, stash n", "tspipe and larger stashes are as fast"
    assert max(found.plan.proof.stash_peak) == 4


def test_only_what_is_exact_is_considered_for_a_momentum_teacher() -> None:
    found = search_pipelines(TWO_VIEWS, MOMENTUM, devices=2, microbatches=4)
    assert [one.name for one in found.considered] == EXACT
    assert found.plan.proof.staleness == 0


def test_staleness_1_considers_more_and_still_prefers_what_is_exact() -> None:
    found = search_pipelines(TWO_VIEWS, MOMENTUM, devices=2, microbatches=4, staleness=1)
    stale = {one.name: one.plan.proof.staleness for one in found.considered if one.plan is not None}
    assert {"tspipe", "fill+stale", "fill+split+stale"} < set(stale)
    assert "async" not in stale, "an ablation is never suggested"
    assert {name for name, steps in stale.items() if steps} == {n for n in stale if n == "tspipe" or "stale" in n}
    fastest = min(one.plan.prediction.seconds_per_step for one in found.considered if one.plan is not None)
    assert found.plan.prediction.seconds_per_step == fastest
    assert found.plan.proof.staleness == 0, "an exact one is as fast here"


@pytest.mark.parametrize(
    ("strategy", "names"),
    [
        ("fill+split", ["fill+split, stash n", "fill+split", "fill+split, stash all"]),
        ("1f1b", ["1f1b"]),
        ("tspipe", ["tspipe"]),  # named, so its staleness is wanted
        ("async", ["async"]),
        ("fill+stale", ["fill+stale", "fill+stale, stash all"]),
    ],
)
def test_a_named_strategy_brings_its_variants(strategy: str, names: list[str]) -> None:
    found = search_pipelines(TWO_VIEWS, MOMENTUM, devices=2, microbatches=2, strategy=strategy)
    assert [one.name for one in found.considered] == names


def test_variants_with_the_same_stash_share_a_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one device n, 2n-1 and all of one microbatch are one unit; each variant keeps its own name and knob."""
    made = []

    def counted(*args: Any, **options: Any) -> Any:
        made.append(options["strategy"])
        return make_plan(*args, **options)

    monkeypatch.setattr(search_module, "make_plan", counted)
    found = search_pipelines(FROZEN, Demands(), devices=1, microbatches=1, strategy="fill")
    stashes = {one.name: one.plan.stash for one in found.considered if one.plan is not None}
    assert stashes == {
        "fill": None, "fill, stash all": "all", "fill+split, stash n": "n", "fill+split": None, "fill+split, stash all": "all",
    }  # fmt: skip
    assert len(made) == 2, "one with whole backwards and one with split ones"
    assert found.chosen.name == "fill"


@pytest.mark.parametrize(
    ("demands", "knobs", "message"),
    [
        (Demands(), {"staleness": 1}, "staleness is of a momentum teacher"),
        (Demands(), {"strategy": "async"}, "'async' is for momentum teachers"),
        (Demands(), {"strategy": "fil"}, r"no strategy 'fil' \(did you mean 'fill'\?\)"),
        (Demands(), {"devices": 5}, "4 blocks for 5 devices"),
        (Demands(), {"staleness": 2}, "staleness is 2; expected 0 or 1"),
        (MOMENTUM, {"strategy": "tspipe", "staleness": 0}, "one step old"),
    ],
)
def test_what_cannot_be_searched_is_said(demands: Demands, knobs: dict[str, object], message: str) -> None:
    costs = TWO_VIEWS if demands.momentum else FROZEN
    with pytest.raises(PlanError, match=message):
        search_pipelines(costs, demands, **{"devices": 2, "microbatches": 2, **knobs})  # type: ignore[arg-type]


def test_slow_links_are_worth_a_stash() -> None:
    slow = FROZEN.with_surroundings(Link(latency_seconds=8.0), 1.0)
    assert "stash all" in search_pipelines(slow, Demands(), devices=2, microbatches=4, strategy="fill").chosen.name


def test_of_blocks_every_strategy_is_considered() -> None:
    found = search_blockwise(UNEVEN, devices=2, batch=16)
    assert [one.name for one in found.considered] == list(BLOCKWISE_STRATEGIES)
    seconds = {one.name: one.plan.seconds_per_batch for one in found.considered if one.plan is not None}
    assert seconds[found.chosen.name] == pytest.approx(min(seconds.values()), rel=1e-3)


def test_memory_refuses_with_numbers_and_chooses_otherwise() -> None:
    free = search_blockwise(UNEVEN, devices=2, batch=16)
    most = {one.name: max(one.plan.memory_bytes) for one in free.considered if one.plan is not None}
    limit = sorted(set(most.values()))[1]
    tight = search_blockwise(UNEVEN, devices=2, batch=16, memory_bytes=limit)
    refused = {one.name: one.refused for one in tight.considered if one.plan is None}
    assert refused
    assert all("MiB" in reason for reason in refused.values())
    assert max(tight.plan.memory_bytes) <= limit
    with pytest.raises(PlanError, match="fits into"):
        search_blockwise(UNEVEN, devices=2, batch=16, memory_bytes=100)
