"""Blockwise plans as JSON: the same plan is found again, and what is none is refused."""

import json

import pytest
from schedule.blockwise.tasks import line

from pipestill.costs import Link
from pipestill.errors import ConfigError
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES, make_blockwise_plan
from pipestill.plan.blockwise.plan_json import blockwise_plan_from_json, blockwise_plan_to_json, is_blockwise_plan
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes

LINK = Link(latency_seconds=20e-6, bytes_per_second=10e9)
HELD = BlockProfile(tuple(BlockTimes("block", (1,), (1.0,), (i,), 10, 8, 5, 7, 1) for i in (1.0, 2.0, 3.0)), LINK)


@pytest.mark.parametrize("strategy", BLOCKWISE_STRATEGIES)
def test_every_strategy_is_found_again(strategy: str) -> None:
    plan = make_blockwise_plan(HELD, strategy=strategy, devices=2, batch=8, memory_bytes=1e6, speeds=[1.0, 2.0])
    data = blockwise_plan_to_json(plan, memory_bytes=1e6)
    assert blockwise_plan_from_json(json.dumps(data)) == plan
    assert (data["strategy"], data["devices"], data["batch"], data["memory_limit_bytes"]) == (strategy, 2, 8, 1e6)
    assert (data["seconds_per_step"], data["memory_bytes"]) == (plan.seconds_per_batch, list(plan.memory_bytes))
    assert sorted(block for phase in data["phases"] for block in phase["blocks"]) == [0, 1, 2]


def test_measured_allreduces_are_kept_with_the_plan() -> None:
    profile = BlockProfile((line(0.0, 1.0), line(0.0, 0.2)), LINK).with_allreduces((2,), [(0.5,), (0.5,)])
    plan = make_blockwise_plan(profile, strategy="hybrid", devices=2, batch=10)
    again = blockwise_plan_from_json(json.dumps(blockwise_plan_to_json(plan)))
    assert again.costs == plan.costs
    assert again.seconds_per_batch == plan.seconds_per_batch


def test_only_blockwise_plans_are_taken_for_such() -> None:
    text = json.dumps(blockwise_plan_to_json(make_blockwise_plan(HELD, strategy="dp", devices=1, batch=1)))
    assert is_blockwise_plan(text)
    assert not any(map(is_blockwise_plan, ["", "{", "[]", "3", '{"kind": "pipeline"}']))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the plan is not JSON"),
        ("[]", "not a blockwise one of version 1"),
        ('{"version": 2, "kind": "blockwise"}', "not a blockwise one of version 1"),
        ('{"version": 1, "kind": "blockwise"}', "lacks or does not know: 'profile'"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        blockwise_plan_from_json(text)


def test_a_field_that_no_block_has_is_named() -> None:
    data = blockwise_plan_to_json(make_blockwise_plan(HELD, strategy="dp", devices=1, batch=1))
    data["profile"]["blocks"][1]["colour"] = "red"
    with pytest.raises(ConfigError, match="does not know: .*colour"):
        blockwise_plan_from_json(json.dumps(data))
