"""Every strategy that could train a task, planned and timed, and the one to take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from pipestill.costs import Costs
from pipestill.errors import PlanError, nearest
from pipestill.plan.blockwise.costs import Problem
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES, BlockwisePlan, make_blockwise_plan
from pipestill.plan.partition import level
from pipestill.plan.plan import Plan, make_plan
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.schedule.pipeline.structure import Demands

P = TypeVar("P", Plan, BlockwisePlan)
_ALIKE = 1.001  # steps that differ by less take equally long, as far as costs can tell
_NEAR = 1.1  # plans that take no more than that many times as long as the fastest may be faster when cut in another way
_SPLIT, _STALE = {"split_backward": True}, {"staleness": 1}
_VARIANTS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "gpipe": {},
    "1f1b": {},
    "tspipe": {},
    "async": {},
    "fill": {},
    "fill, stash all": {"stash": "all"},
    "fill+split, stash n": {**_SPLIT, "stash": "n"},
    "fill+split": {**_SPLIT},
    "fill+split, stash all": {**_SPLIT, "stash": "all"},
    "fill+stale": {**_STALE},
    "fill+stale, stash all": {**_STALE, "stash": "all"},
    "fill+split+stale, stash n": {**_SPLIT, **_STALE, "stash": "n"},
    "fill+split+stale": {**_SPLIT, **_STALE},
    "fill+split+stale, stash all": {**_SPLIT, **_STALE, "stash": "all"},
}


@dataclass(frozen=True)
class Considered(Generic[P]):
    """One strategy with its knobs: its plan, or why there is none.

    `recut`: the plan's partition is not the one that `make_plan` finds, but one that proved faster.
    """

    name: str
    plan: P | None = None
    refused: str = ""
    recut: bool = False


@dataclass(frozen=True)
class Search(Generic[P]):
    """All that was considered, and what was chosen of it."""

    considered: tuple[Considered[P], ...]
    chosen: Considered[P]

    @property
    def plan(self) -> P:
        """The chosen plan."""
        assert self.chosen.plan is not None, "what is chosen has a plan"
        return self.chosen.plan


def search_pipelines(
    costs: Costs,
    demands: Demands,
    *,
    devices: int,
    microbatches: int,
    staleness: int | None = None,
    strategy: str | None = None,
    memory_bytes: float | None = None,
    progress: Callable[[str], object] = lambda name: None,
) -> Search[Plan]:
    """Every strategy for models trained end to end, or every variant of `strategy`; of those whose ranks hold at most
    `memory_bytes` the fastest is chosen, and of equally fast ones one that is never stale, then that with the smallest stash.

    Only those whose momentum teacher is never stale, unless `staleness` is 1 or `strategy` has no other. `async`, whose
    student is stale too, has to be named. Raises `PlanError` when none can be planned.
    """
    considered: list[Considered[Plan]] = []
    for name, knobs in _candidates(demands, staleness, strategy).items():
        progress(name)
        make = partial(
            make_plan, costs, devices=devices, microbatches=microbatches, demands=demands, memory_bytes=memory_bytes,
            strategy=_named(name)[-1], **knobs,
        )  # fmt: skip
        considered.append(_tried(name, make))
    found = _best(
        considered,
        lambda plan: plan.prediction.seconds_per_step,
        lambda plan: (plan.proof.staleness, max(plan.proof.stash_peak)),
    )
    progress(f"{found.chosen.name}, cut in other ways")
    return _recut(found, memory_bytes)


def _recut(found: Search[Plan], memory_bytes: float | None) -> Search[Plan]:
    """The same with the plans that are nearly as fast as the chosen one cut in other ways, where one of them is faster.

    How much of the student's own path a schedule hides differs, so weights between none of it and all of it are tried, on
    one variant of each kind.
    """
    best, first = found.plan, found.chosen
    if best.demands.momentum or not best.teacher_partition:
        return found
    path = (best.microbatches + best.num_devices - 1) / best.microbatches
    cuts = [level(best.costs, best.num_devices, best.demands, student_weight=1 + (path - 1) * k / 3) for k in range(3)]
    near = {_named(one.name)[1]: one for one in reversed((*found.considered, first)) if _is_near(one, best)}
    for one in (first, *(other for other in near.values() if other is not first)):
        assert one.plan is not None
        for student, teacher in dict.fromkeys(cuts):
            other = dataclasses.replace(one.plan, student_partition=student, teacher_partition=teacher)
            fits = memory_bytes is None or max(other.memory_bytes) <= memory_bytes
            if fits and other.prediction.seconds_per_step * _ALIKE < best.prediction.seconds_per_step:
                best, first = other, one
    if best is found.plan:
        return found
    chosen = dataclasses.replace(first, plan=best, recut=True)
    return Search(tuple(chosen if one is first else one for one in found.considered), chosen)


def _is_near(one: Considered[Plan], best: Plan) -> bool:
    return one.plan is not None and one.plan.prediction.seconds_per_step <= _NEAR * best.prediction.seconds_per_step


def search_blockwise(
    profile: BlockProfile,
    *,
    devices: int,
    batch: int,
    memory_bytes: float | None = None,
    strategy: str | None = None,
    speeds: Sequence[float] | None = None,
) -> Search[BlockwisePlan]:
    """Every strategy for blocks that learn alone, or `strategy` only; of those whose ranks hold at most `memory_bytes` the
    fastest is chosen, and of equally fast ones the simplest. Raises `PlanError` when none fits.
    """
    if strategy is not None and strategy not in BLOCKWISE_STRATEGIES:
        raise PlanError(_unknown(strategy, BLOCKWISE_STRATEGIES))
    Problem(profile, batch, devices, speeds, memory_bytes)  # or what is wrong with it
    make = partial(make_blockwise_plan, profile, devices=devices, batch=batch, memory_bytes=memory_bytes, speeds=speeds)
    names = BLOCKWISE_STRATEGIES if strategy is None else [strategy]
    considered = [_tried(name, partial(make, strategy=name)) for name in names]
    return _best(considered, lambda plan: plan.seconds_per_batch, lambda plan: ())


def _named(name: str) -> tuple[str, str, str]:
    """What a variant goes by: its own name, that without its stash, and its strategy's."""
    variant = name.split(",")[0]
    return name, variant, variant.split("+")[0]


def _candidates(demands: Demands, staleness: int | None, strategy: str | None) -> dict[str, dict[str, Any]]:
    """Names of variants and their knobs."""
    if staleness not in (None, 0, 1):
        raise PlanError(f"staleness is {staleness}; expected 0 or 1")
    if staleness and not demands.momentum:
        raise PlanError("staleness is of a momentum teacher; a frozen one has no versions; leave it out")
    known = list(dict.fromkeys(_named(name)[1] for name in _VARIANTS))
    if strategy is not None and strategy not in known:
        raise PlanError(_unknown(strategy, known))
    mine = {k: v for k, v in _VARIANTS.items() if (k != "async" if strategy is None else strategy in _named(k))}
    if not demands.momentum:  # a frozen teacher is never stale
        mine = {k: v for k, v in mine.items() if k != "async" and "staleness" not in v}
        if not mine:
            raise PlanError(f"'{strategy}' is for momentum teachers, and this one is frozen; choose another")
        return mine
    exact = {k: v for k, v in mine.items() if k not in ("tspipe", "async") and "staleness" not in v}
    if staleness == 0 and not exact:
        raise PlanError(f"'{strategy}' reads a momentum teacher that is one step old; leave out --staleness 0")
    return mine if staleness or not exact else exact


def _unknown(strategy: str, known: Iterable[str]) -> str:
    return f"no strategy '{strategy}'{nearest(strategy, known)}; there are {', '.join(known)}"


def _tried(name: str, make: Callable[[], P]) -> Considered[P]:
    try:
        return Considered(name, make())
    except PlanError as error:
        return Considered(name, refused=str(error))


def _best(
    considered: Sequence[Considered[P]], seconds: Callable[[P], float], burden: Callable[[P], tuple[int, ...]]
) -> Search[P]:
    """The fastest; of equally fast ones the one with the least burden, then the first."""
    planned = [(one, one.plan) for one in considered if one.plan is not None]
    if not planned:
        reasons = {one.refused: one.name for one in reversed(considered)}  # often all the same
        told = [reason if len(reasons) == 1 else f"{name}: {reason}" for reason, name in reversed(reasons.items())]
        raise PlanError("; ".join(told))
    least = min(seconds(plan) for _, plan in planned) * _ALIKE
    chosen, _ = min((pair for pair in planned if seconds(pair[1]) <= least), key=lambda pair: burden(pair[1]))
    return Search(tuple(considered), chosen)
