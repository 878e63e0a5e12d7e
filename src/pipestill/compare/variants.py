"""Names of strategies to compare: those that train, `fill` with knobs behind a `+`, and PyTorch's own pipelines."""

from __future__ import annotations

from typing import Any, Literal

from pipestill.errors import ConfigError, nearest
from pipestill.schedule import PIPELINE_STRATEGIES
from pipestill.train.engine import REFERENCE

PEERS: dict[str, Literal["1f1b", "gpipe"]] = {"torch-1f1b": "1f1b", "torch-gpipe": "gpipe"}
"""Schedules of `torch.distributed.pipelining`, the teacher run first: what users would have without us."""

VARIANTS: dict[str, dict[str, Any]] = {
    "split": {"split_backward": True}, "stale": {"staleness": 1}, "all": {"stash": "all"},
}  # fmt: skip
"""Knobs that may follow `fill` after a `+`, each alone or with others: fill+split, fill+split+stale, fill+split+all."""


def variant(name: str) -> tuple[str, dict[str, Any]]:
    """The strategy and the knobs that a name such as fill+split stands for; `ConfigError` for an unknown one."""
    strategy, *given = name.split("+")
    known = (REFERENCE, *PIPELINE_STRATEGIES, *PEERS)
    if strategy not in known:
        raise ConfigError(f"no strategy '{strategy}'{nearest(strategy, known)}; there are {', '.join(known)}")
    knobs: dict[str, Any] = {}
    for knob in given:
        if strategy != "fill" or knob not in VARIANTS:
            raise ConfigError(f"no variant '{name}'; after fill there may be {', '.join(f'+{v}' for v in VARIANTS)}")
        knobs |= VARIANTS[knob]
    return strategy, knobs
