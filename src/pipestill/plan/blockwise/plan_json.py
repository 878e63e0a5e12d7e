"""Blockwise plans as JSON: what they were found from, so that the same plan is found again, and their figures for readers."""

import dataclasses
import json
from typing import Any

from pipestill.costs import Link
from pipestill.errors import ConfigError
from pipestill.plan.blockwise.describe import describe
from pipestill.plan.blockwise.plan import BlockwisePlan, make_blockwise_plan
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes

_VERSION, _KIND = 1, "blockwise"


def blockwise_plan_to_json(plan: BlockwisePlan, memory_bytes: float | None = None) -> dict[str, Any]:
    """Write what a plan was found from, for `blockwise_plan_from_json`, and its figures.

    `ranks` says in words which rank trains what; `phases` are blocks that are trained together. Seconds are of training every
    block on one batch.

    Args:
        plan: the plan
        memory_bytes: the limit that it was found under
    """
    return {
        "version": _VERSION,
        "kind": _KIND,
        "strategy": plan.strategy,
        "devices": plan.num_devices,
        "batch": plan.costs.batch,
        "speeds": list(plan.costs.speeds),
        "memory_limit_bytes": memory_bytes,
        "seconds_per_step": plan.seconds_per_batch,
        "limit_seconds_per_step": plan.limit_seconds_per_batch,
        "memory_bytes": list(plan.memory_bytes),
        "ranks": describe(plan),
        "phases": [{"ranks": p.ranks, "blocks": p.blocks, "window": p.window} for p in plan.phases],
        "stages": [dataclasses.asdict(stage) for stage in plan.chosen.stages] if plan.chosen else [],
        "profile": {**dataclasses.asdict(plan.costs.profile), "link": plan.costs.profile.link.to_json()},
    }


def is_blockwise_plan(text: str) -> bool:
    """Whether the JSON of a plan is that of a blockwise one, and not of a pipeline's."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        return False
    return isinstance(data, dict) and data.get("kind") == _KIND


def blockwise_plan_from_json(text: str) -> BlockwisePlan:
    """Find the plan again that `blockwise_plan_to_json` wrote; `ConfigError` says what is wrong with it."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the plan is not JSON: {error}") from None
    if not isinstance(data, dict) or (data.get("version"), data.get("kind")) != (_VERSION, _KIND):
        raise ConfigError(f"the plan is not a blockwise one of version {_VERSION}")
    try:
        profile = data["profile"]
        blocks = (BlockTimes(**{name: _read(value) for name, value in block.items()}) for block in profile["blocks"])
        return make_blockwise_plan(
            BlockProfile(tuple(blocks), Link.from_json(profile["link"]), profile["batch"]),
            strategy=data["strategy"],
            devices=data["devices"],
            batch=data["batch"],
            memory_bytes=data["memory_limit_bytes"],
            speeds=data["speeds"] or None,
        )
    except (TypeError, KeyError) as error:
        raise ConfigError(f"the plan lacks or does not know: {error}") from None


def _read(value: Any) -> Any:
    """Read a value of JSON; a sequence becomes a tuple."""
    return tuple(value) if isinstance(value, list) else value
