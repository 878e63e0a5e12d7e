"""Names of strategies to compare: a workload's own, `fill` with knobs behind a `+`, and PyTorch's own pipelines."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal

from pipestill.errors import ConfigError, nearest
from pipestill.recipes.run_options import RunOptions
from pipestill.train.engine import REFERENCE

PEERS: dict[str, Literal["1f1b", "gpipe"]] = {"torch-1f1b": "1f1b", "torch-gpipe": "gpipe"}
"""Schedules of `torch.distributed.pipelining`, the teacher run first: what users would have without us."""

VARIANTS: dict[str, dict[str, Any]] = {"split": {"split_backward": True}, "stale": {"staleness": 1}, "all": {"stash": "all"}}
"""Knobs that may follow `fill` after a `+`, each alone or with others: fill+split, fill+split+stale, fill+split+all."""


def variant(name: str, strategies: Collection[str]) -> tuple[str, dict[str, Any]]:
    """Split a name such as fill+split into a strategy and its knobs.

    Args:
        name: what is to be compared
        strategies: those that can train the workload

    Raises:
        ConfigError: for a strategy that is not among them and no peer of one, and for unknown knobs.
    """
    strategy, *given = name.split("+")
    known = (*strategies, *(peer for peer, kind in PEERS.items() if kind in strategies))
    if strategy not in known:
        raise ConfigError(f"no strategy '{strategy}'{nearest(strategy, known)}; there are {', '.join(known)}")
    knobs: dict[str, Any] = {}
    for knob in given:
        if strategy != "fill" or knob not in VARIANTS:
            raise ConfigError(f"no variant '{name}'; after fill there may be {', '.join(f'+{v}' for v in VARIANTS)}")
        knobs |= VARIANTS[knob]
    return strategy, knobs


def options_of(name: str, options: RunOptions, strategies: Collection[str]) -> RunOptions:
    """The options that train by the named variant, on costs that all variants share; knobs of `fill` are left to `fill`.

    Those of a peer are for the plan whose partition it gets, that of our own 1F1B.
    """
    strategy, knobs = variant(name, strategies)
    if strategy == REFERENCE:
        return options.as_reference()
    others: dict[str, Any] = {"run_ahead": None, "staleness": None, "split_backward": False, "stash": None}
    own = knobs if strategy == "fill" else others
    return replace(options, strategy="1f1b" if strategy in PEERS else strategy, costs=None, **own)
