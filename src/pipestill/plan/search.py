"""Search: plan every strategy that could train a task, time each plan, and choose one."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from pipestill.costs import Costs
from pipestill.errors import PlanError, nearest
from pipestill.plan.blockwise.cost_model import Problem
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES, BlockwisePlan, make_blockwise_plan
from pipestill.plan.partition import level
from pipestill.plan.plan import Plan, check_counts, make_plan
from pipestill.schedule import PIPELINE_STRATEGIES
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.schedule.pipeline.fill import stash_units
from pipestill.schedule.pipeline.structure import Demands, pipeline

P = TypeVar("P", Plan, BlockwisePlan)
_ALIKE = 1.001  # steps that differ by less take equally long, as far as costs can tell
_NEAR = 1.1  # plans that take no more than that many times as long as the fastest may be faster with other partitions


@dataclass(frozen=True, slots=True)
class _Variant:
    """A pipeline's strategy with settings of its knobs, which are those of `Plan`."""

    strategy: str
    split_backward: bool = False
    staleness: int | None = None
    stash: int | str | None = None

    @property
    def kind(self) -> str:
        """The name without the stash, such as `fill+split`."""
        return self.strategy + "+split" * self.split_backward + "+stale" * bool(self.staleness)

    @property
    def name(self) -> str:
        """The name in tables, such as `fill+split, stash n`."""
        return self.kind if self.stash is None else f"{self.kind}, stash {self.stash}"


_VARIANTS = (
    *(_Variant(strategy) for strategy in PIPELINE_STRATEGIES if strategy != "fill"),
    *(
        _Variant("fill", split_backward, staleness, stash)
        for staleness in (None, 1)
        for split_backward, stash in ((False, None), (False, "all"), (True, "n"), (True, None), (True, "all"))
    ),
)


@dataclass(frozen=True)
class Considered(Generic[P]):
    """One strategy with its knobs: its plan, or why there is none."""

    name: str
    plan: P | None = None
    refused: str = ""


@dataclass(frozen=True)
class Search(Generic[P]):
    """Everything that was considered, and which of that was chosen."""

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
    """Plan every strategy for models that are trained end to end, and choose the fastest plan.

    Of equally fast plans, one that is never stale is chosen, and of these the one with the smallest stash.

    Args:
        costs: seconds and bytes of both models' blocks
        demands: what the task asks of any schedule
        devices: number of ranks
        microbatches: slices of a batch
        staleness: 1 considers strategies whose momentum teacher is one step old too
        strategy: consider only variants of this one; `async`, whose student is stale too, is considered only by name
        memory_bytes: most bytes that a rank may hold (default: no limit)
        progress: called with the name of each variant before it is planned

    Raises:
        PlanError: no variant can be planned; the message says why
    """
    check_counts(devices, microbatches)
    planned: dict[_Variant, Considered[Plan]] = {}
    considered: list[Considered[Plan]] = []
    for variant in _candidates(demands, staleness, strategy):
        progress(variant.name)
        resolved = _with_resolved_stash(variant, devices, microbatches, demands)
        if resolved not in planned:
            make = partial(
                make_plan, costs, devices=devices, microbatches=microbatches, demands=demands, memory_bytes=memory_bytes,
                **dataclasses.asdict(variant),
            )  # fmt: skip
            planned[resolved] = _tried(variant.name, make)
        same = planned[resolved]
        plan = None if same.plan is None else same.plan.with_stash(variant.stash)
        considered.append(dataclasses.replace(same, name=variant.name, plan=plan))
    found = _best(
        considered, lambda plan: plan.prediction.seconds_per_step, lambda plan: (plan.proof.staleness, max(plan.proof.stash_peak))
    )
    progress(f"{found.chosen.name}, with other partitions")
    return _repartitioned(found, memory_bytes)


def _with_resolved_stash(variant: _Variant, devices: int, microbatches: int, demands: Demands) -> _Variant:
    """The variant with its stash in units: variants that differ only in words for the same number have the same plan."""
    if variant.strategy != "fill":
        return variant
    same_stash = dataclasses.replace(demands, features=(), ties=())  # these do not change what stays in the stash
    structure = pipeline(devices, microbatches, split=variant.split_backward, **same_stash.of_stages((), ()))
    return dataclasses.replace(variant, stash=stash_units(variant.stash, structure))


def _repartitioned(found: Search[Plan], memory_bytes: float | None) -> Search[Plan]:
    """Try other partitions of the plans that are nearly as fast as the chosen one, and choose one of these if it is faster.

    Strategies hide different amounts of the student's own path through the pipeline, so weights of it between none and all
    are tried, on one variant of each kind.
    """
    best, chosen = found.plan, found.chosen
    if best.demands.momentum or not best.teacher_partition:
        return found
    path = (best.microbatches + best.num_devices - 1) / best.microbatches
    partitions = dict.fromkeys(
        level(best.costs, best.num_devices, best.demands, student_weight=1 + (path - 1) * k / 3) for k in range(3)
    )
    for one, plan in _worth_repartitioning(found):
        for student, teacher in partitions:
            if (student, teacher) == (plan.student_partition, plan.teacher_partition):
                continue
            other = dataclasses.replace(plan, student_partition=student, teacher_partition=teacher)
            fits = memory_bytes is None or max(other.memory_bytes) <= memory_bytes
            if fits and other.prediction.seconds_per_step * _ALIKE < best.prediction.seconds_per_step:
                best, chosen = other, one
    if best is found.plan:
        return found
    replaced = dataclasses.replace(chosen, plan=best)
    return Search(tuple(replaced if one is chosen else one for one in found.considered), replaced)


def _worth_repartitioning(found: Search[Plan]) -> list[tuple[Considered[Plan], Plan]]:
    """The chosen plan, and one of each kind (whatever its stash) that takes nearly as little time; no schedule twice."""
    most_seconds = _NEAR * found.plan.prediction.seconds_per_step
    chosen = found.chosen, found.plan
    near = [pair for pair in _planned(found.considered) if pair[1].prediction.seconds_per_step <= most_seconds]
    first_of_kind = {one.name.split(",")[0]: (one, plan) for one, plan in reversed([*near, chosen])}
    return list({id(plan.schedule): (one, plan) for one, plan in reversed([chosen, *first_of_kind.values()])}.values())[::-1]


def search_blockwise(
    profile: BlockProfile,
    *,
    devices: int,
    batch: int,
    memory_bytes: float | None = None,
    strategy: str | None = None,
    speeds: Sequence[float] | None = None,
) -> Search[BlockwisePlan]:
    """Plan every strategy of blockwise training, and choose the fastest plan; of equally fast ones the simplest.

    Args:
        profile: seconds and bytes of every block
        devices: number of ranks
        batch: rows of a batch
        memory_bytes: most bytes that a rank may hold (default: no limit)
        strategy: consider this one only
        speeds: work per second of each rank, where 1 is what the profile was measured on (default: all 1)

    Raises:
        PlanError: no strategy can be planned; the message says why
    """
    if strategy is not None and strategy not in BLOCKWISE_STRATEGIES:
        raise PlanError(_unknown(strategy, BLOCKWISE_STRATEGIES))
    Problem(profile, batch, devices, speeds, memory_bytes)  # raises what is wrong with it
    make = partial(make_blockwise_plan, profile, devices=devices, batch=batch, memory_bytes=memory_bytes, speeds=speeds)
    names = BLOCKWISE_STRATEGIES if strategy is None else [strategy]
    considered = [_tried(name, partial(make, strategy=name)) for name in names]
    return _best(considered, lambda plan: plan.seconds_per_batch, lambda plan: ())


def _candidates(demands: Demands, staleness: int | None, strategy: str | None) -> list[_Variant]:
    """The variants that fit the task and what a user asked for; `PlanError` where there are none."""
    if staleness not in (None, 0, 1):
        raise PlanError(f"staleness is {staleness}; expected 0 or 1")
    if staleness and not demands.momentum:
        raise PlanError("staleness is of a momentum teacher; a frozen one has no versions; leave it out")
    kinds = dict.fromkeys(variant.kind for variant in _VARIANTS)
    if strategy is not None and strategy not in kinds:
        raise PlanError(_unknown(strategy, kinds))
    if strategy is None:
        variants = [variant for variant in _VARIANTS if variant.strategy != "async"]
    else:
        variants = [variant for variant in _VARIANTS if strategy in (variant.strategy, variant.kind)]
    if not demands.momentum:
        variants = [variant for variant in variants if variant.strategy != "async" and not variant.staleness]
        if not variants:
            raise PlanError(f"'{strategy}' is for momentum teachers, and this one is frozen; choose another")
        return variants
    exact = [variant for variant in variants if variant.strategy not in ("tspipe", "async") and not variant.staleness]
    if staleness == 0 and not exact:
        raise PlanError(f"'{strategy}' reads a momentum teacher that is one step old; leave out --staleness 0")
    return variants if staleness or not exact else exact


def _unknown(strategy: str, known: Iterable[str]) -> str:
    """The message about a strategy that there is not."""
    return f"no strategy '{strategy}'{nearest(strategy, known)}; there are {', '.join(known)}"


def _tried(name: str, make: Callable[[], P]) -> Considered[P]:
    """Make a plan, or note why there is none."""
    try:
        return Considered(name, make())
    except PlanError as error:
        return Considered(name, refused=str(error))


def _planned(considered: Sequence[Considered[P]]) -> list[tuple[Considered[P], P]]:
    """Select what was considered and has a plan, with that plan."""
    return [(one, one.plan) for one in considered if one.plan is not None]


def _best(
    considered: Sequence[Considered[P]], seconds: Callable[[P], float], burden: Callable[[P], tuple[int, ...]]
) -> Search[P]:
    """Choose the fastest plan; of equally fast ones the one with the least burden, then the first."""
    planned = _planned(considered)
    if not planned:
        reasons = {one.refused: one.name for one in reversed(considered)}  # often all the same
        told = [reason if len(reasons) == 1 else f"{name}: {reason}" for reason, name in reversed(reasons.items())]
        raise PlanError("; ".join(told))
    least = min(seconds(plan) for _, plan in planned) * _ALIKE
    chosen, _ = min((pair for pair in planned if seconds(pair[1]) <= least), key=lambda pair: burden(pair[1]))
    return Search(tuple(considered), chosen)
