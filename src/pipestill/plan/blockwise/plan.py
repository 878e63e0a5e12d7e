"""A plan of blockwise training: which ranks train which blocks when, and how long that should take."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from pipestill.arguments import mebibytes
from pipestill.errors import PlanError, nearest
from pipestill.plan.blockwise.balanced import balanced
from pipestill.plan.blockwise.cost_model import Problem, dp_seconds, ls
from pipestill.plan.blockwise.hybrid import Hybrid, hybrid, relay
from pipestill.plan.blockwise.memory import memory_bytes_of
from pipestill.schedule import Proof, Schedule, Trace, check
from pipestill.schedule.blockwise.generate import alone, staged
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes
from pipestill.schedule.blockwise.structure import BlockwiseCosts, BlockwiseStructure
from pipestill.schedule.simulate import simulate

BLOCKWISE_STRATEGIES = {
    "dp": "one block after the other, each on all ranks' rows and with all of the teacher before it (baseline)",
    "ls": "whole blocks as tasks of single ranks, each with all of the teacher before it (baseline)",
    "relay": "consecutive blocks on each rank, the teacher's outputs passed on; every step ends together",
    "relay-dpu": "the same, and every block updates as soon as it can",
    "hybrid": "groups of ranks share the rows of consecutive blocks; the best such plan, found exactly",
    "balanced": "blocks move between ranks within a window of batches, or are shared unequally: loads are level",
}
"""Strategies of blockwise training, each with a line of help."""


@dataclass(frozen=True)
class Phase:
    """Blocks that are trained together, over all of the data.

    Args:
        ranks: the ranks that train them; the schedule counts these from 0
        blocks: the blocks
        schedule: which rank runs what when; `ScheduleError` where it is refused
    """

    ranks: tuple[int, ...]
    blocks: tuple[int, ...]
    schedule: Schedule[BlockwiseStructure]
    proof: Proof = field(init=False, repr=False, compare=False)
    """What the checker established about the schedule."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "proof", check(self.schedule))

    @property
    def window(self) -> int:
        """The number of batches that one step of the schedule takes."""
        return self.schedule.structure.window


@dataclass(frozen=True)
class BlockwisePlan:
    """Everything that fixes which rank does what when, with its proofs and its times. A rank goes through its phases in order.

    Args:
        strategy: one of `BLOCKWISE_STRATEGIES`
        num_devices: number of ranks
        costs: seconds and bytes of all work
        phases: blocks that are trained together, with their schedules
        chosen: the stages of relay and hybrid, and their seconds in Pipe-BD's cost model; None for other strategies
    """

    strategy: str
    """Name of the strategy."""
    num_devices: int
    """Number of ranks."""
    costs: BlockwiseCosts
    """What the blocks take for a batch, on these ranks."""
    phases: tuple[Phase, ...]
    """Blocks that are trained together, with their ranks and schedule, in order."""
    chosen: Hybrid | None = None
    predictions: tuple[Trace, ...] = field(init=False, repr=False, compare=False)
    """For each phase, its schedule's actions with the times that the simulator expects."""

    def __post_init__(self) -> None:
        traces = (simulate(phase.schedule, self.costs.on(phase.ranks)) for phase in self.phases)
        object.__setattr__(self, "predictions", tuple(traces))

    @cached_property
    def memory_bytes(self) -> tuple[int, ...]:
        """The most bytes that each rank holds; empty where the profile does not say what blocks hold.

        Blocks that another phase trains are taken not to be on the device.
        """
        if not self.costs.profile.memory_known:
            return ()
        most = [0] * self.num_devices
        for phase in self.phases:
            for rank, held in zip(phase.ranks, memory_bytes_of(phase.schedule, self.costs), strict=True):
                most[rank] = max(most[rank], held)
        return tuple(most)

    @property
    def seconds_per_batch(self) -> float:
        """Predicted seconds of training every block on one batch, in the steady state."""
        return self.total([trace.seconds_per_step for trace in self.predictions])

    def total(self, seconds_per_step: Sequence[float]) -> float:
        """Seconds a batch of the rank that is busy longest.

        Args:
            seconds_per_step: seconds of a step of each phase's schedule
        """
        busy = defaultdict[int, float](float)
        for phase, seconds in zip(self.phases, seconds_per_step, strict=True):
            for rank in phase.ranks:
                busy[rank] += seconds / phase.window
        return max(busy.values())

    @property
    def utilisation(self) -> float:
        """Predicted busy fraction of the ranks' time, over all phases."""
        return self.utilisation_in(self.predictions, self.seconds_per_batch)

    def utilisation_in(self, traces: Sequence[Trace], seconds_per_batch: float) -> float:
        """Busy fraction of the ranks' time in traces, one of each phase, where a batch took so many seconds.

        Args:
            traces: a trace of each phase
            seconds_per_batch: seconds of training every block on one batch
        """
        busy = sum(sum(t.busy_seconds_per_step()) / p.window for t, p in zip(traces, self.phases, strict=True))
        return min(1.0, busy / (self.num_devices * seconds_per_batch)) if seconds_per_batch else 0.0

    @property
    def window(self) -> int:
        """The most batches that one step of a phase's schedule takes."""
        return max(phase.window for phase in self.phases)

    @property
    def cost_model_seconds_per_batch(self) -> float | None:
        """Seconds a batch by Pipe-BD's cost model; None for `balanced`, for which that has no terms."""
        profile, batch, speeds = self.costs.profile, self.costs.batch, self.costs.speeds or None
        if self.strategy == "dp":
            return dp_seconds(profile, batch, self.num_devices, speeds=speeds)
        if self.strategy == "ls":
            return ls(profile, batch, self.num_devices, speeds=speeds).seconds
        return self.chosen.seconds if self.chosen else None

    @property
    def limit_seconds_per_batch(self) -> float:
        """The least seconds a batch of any plan: all work once, divided evenly, on as many rows at a time as are cheapest."""
        costs, pace = self.costs, sum(self.costs.speeds) or self.num_devices
        return sum(_least_seconds(block, costs.batch, self.num_devices) for block in costs.profile.blocks) / pace


def _least_seconds(block: BlockTimes, batch: int, num_ranks: int) -> float:
    """Seconds of a batch in a teacher block and its student block, in parts of any size from a row or an equal share up.

    Seconds lie on lines between measured points, and on one line a row costs least at an end of it.
    """
    fewest = min(1.0, batch / num_ranks)
    rows = [fewest, batch, *(rows for rows in block.rows if fewest < rows < batch)]
    return sum(min(seconds(r) * batch / r for r in rows) for seconds in (block.teacher, block.student))


def make_blockwise_plan(
    profile: BlockProfile,
    *,
    strategy: str,
    devices: int,
    batch: int,
    memory_bytes: float | None = None,
    speeds: Sequence[float] | None = None,
) -> BlockwisePlan:
    """Make the plan of a strategy from a profile of the blocks.

    Args:
        profile: seconds and bytes of every block
        strategy: one of `BLOCKWISE_STRATEGIES`
        devices: number of ranks
        batch: rows of a batch
        memory_bytes: most bytes that a rank may hold (default: no limit); hybrid and balanced choose accordingly
        speeds: work per second of each rank, where 1 is what the profile was measured on (default: all 1)

    Raises:
        PlanError: there is no such strategy, a count is below 1, or nothing fits
    """
    if strategy not in BLOCKWISE_STRATEGIES:
        known = ", ".join(BLOCKWISE_STRATEGIES)
        raise PlanError(f"no strategy '{strategy}' for blocks{nearest(strategy, BLOCKWISE_STRATEGIES)}; there are {known}")
    Problem(profile, batch, devices, speeds, memory_bytes)  # raises what is wrong with it
    blocks, everybody = range(len(profile.blocks)), tuple(range(devices))
    costs = BlockwiseCosts(profile, batch, tuple(speeds or ()))
    chosen: Hybrid | None = None
    if strategy == "dp":
        phases = [Phase(everybody, (block,), alone("dp", block, devices)) for block in blocks]
    elif strategy == "ls":
        assignment = ls(profile, batch, devices, speeds=speeds).assignment
        phases = [Phase((r,), (block,), alone("ls", block, 1)) for r, mine in enumerate(assignment) for block in mine]
    elif strategy == "balanced":
        schedule, ranks = balanced(costs, devices, memory_bytes)
        phases = [Phase(ranks, tuple(blocks), schedule)]
    else:
        search = hybrid if strategy == "hybrid" else relay
        chosen = search(profile, batch, devices, memory_bytes=memory_bytes, speeds=speeds)
        groups = [(range(stage.first, stage.end), stage.ranks) for stage in chosen.stages]
        used = sorted(rank for _, ranks in groups for rank in ranks)
        local = {rank: i for i, rank in enumerate(used)}
        groups = [(held, tuple(local[rank] for rank in ranks)) for held, ranks in groups]
        schedule = staged(strategy, groups, barrier=strategy == "relay")
        phases = [Phase(tuple(used), tuple(blocks), schedule)]
    plan = BlockwisePlan(strategy, devices, costs, tuple(phases), chosen)
    if memory_bytes is not None and max(plan.memory_bytes) > memory_bytes:
        most = max(plan.memory_bytes)
        raise PlanError(
            f"'{strategy}' holds {mebibytes(most)} on rank {plan.memory_bytes.index(most)}, more than the "
            f"{mebibytes(memory_bytes)} that it may; use a batch of fewer rows than {batch}, or 'hybrid'"
        )
    return plan
