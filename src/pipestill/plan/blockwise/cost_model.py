"""A cost model of blockwise training: seconds and bytes of stages of consecutive blocks on groups of ranks.

It is that of Pipe-BD (Jang et al., DATE 2023). Plans are searched for with it, and then timed by the simulator.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from pipestill.arguments import mebibytes, raise_problems
from pipestill.errors import PlanError
from pipestill.schedule.blockwise.generate import AHEAD
from pipestill.schedule.blockwise.profile import BlockProfile

Speeds = Sequence[float] | None
"""Work per second of each rank, where 1 is what the profile was measured on; None where all are 1."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Blocks from `first` up to, without, `end`; the group `ranks` shares each batch's rows equally."""

    first: int
    end: int
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        assert 0 <= self.first < self.end, f"a stage of blocks {self.first} to {self.end}"
        assert self.ranks and self.ranks == tuple(range(self.ranks[0], self.ranks[0] + len(self.ranks)))


@dataclass(frozen=True, slots=True)
class LayerWise:
    """A plan of strategy `ls`, in which each rank trains whole blocks by itself, from the sample on."""

    assignment: tuple[tuple[int, ...], ...]
    """The blocks of each rank."""
    rank_seconds: tuple[float, ...]
    """Predicted seconds of each rank for one batch."""

    @property
    def seconds(self) -> float:
        """Predicted seconds of one batch: the slowest rank's."""
        return max(self.rank_seconds)


def stage_seconds(profile: BlockProfile, first: int, end: int, k: int, batch: int, speed: float = 1.0) -> float:
    """Seconds of one batch in blocks [first, end) on k ranks, the slowest of which does `speed` work per second.

    They are the work of each rank's share of batch / k rows, every student block's all-reduce, and the relay of what block
    `first` receives.
    """
    rows = batch / k
    work = sum(block.teacher(rows) + block.student(rows) for block in profile.blocks[first:end])
    exchange = sum(profile.allreduce_seconds(block, k) for block in range(first, end))
    return work / speed + exchange + (profile.relay_seconds(first, batch, k) if first else 0.0)


def stage_memory_bytes(profile: BlockProfile, first: int, end: int, rows: int) -> int:
    """The most bytes that a rank holds which takes `rows` rows through blocks [first, end).

    They are both models' state, the outputs of teacher blocks that its student blocks take (the next batch's input among
    them), those that wait for the next stage, and the activations of one student block at a time, of the one with the most.
    """
    blocks = profile.blocks[first:end]
    state = sum(block.teacher_bytes + block.state_bytes for block in blocks)
    outputs = sum(block.input_bytes_per_row for block in blocks)
    outputs += blocks[0].input_bytes_per_row if first else 0
    outputs += profile.output_bytes_per_row(end - 1) * (1 if end == len(profile.blocks) else 1 + AHEAD)
    return state + rows * (outputs + max(block.activation_bytes_per_row for block in blocks))


def dp_seconds(profile: BlockProfile, batch: int, devices: int, *, speeds: Speeds = None) -> float:
    """Seconds of one batch of every block under `dp`: for each, the teacher up to it and its step on batch / devices rows."""
    slowest = min(Problem(profile, batch, devices, speeds).pace)
    rows = batch / devices
    prefix = accumulate(block.teacher(rows) for block in profile.blocks)
    work = sum(teacher + block.student(rows) for teacher, block in zip(prefix, profile.blocks, strict=True))
    return work / slowest + sum(profile.allreduce_seconds(block, devices) for block in range(len(profile.blocks)))


def ls(profile: BlockProfile, batch: int, devices: int, *, speeds: Speeds = None) -> LayerWise:
    """Give whole blocks to ranks as tasks, the longest first, each to the rank that would end it earliest (Blakeney et al.).

    A task runs the teacher up to its block and the block's step on whole batches; nothing is exchanged.
    """
    pace = Problem(profile, batch, devices, speeds).pace
    prefix = accumulate(block.teacher(batch) for block in profile.blocks)
    tasks = [teacher + block.student(batch) for teacher, block in zip(prefix, profile.blocks, strict=True)]
    load = [0.0] * devices
    assignment: list[list[int]] = [[] for _ in range(devices)]
    for block in sorted(range(len(tasks)), key=lambda block: -tasks[block]):
        rank = min(range(devices), key=lambda rank: (load[rank] + tasks[block]) / pace[rank])
        load[rank] += tasks[block]
        assignment[rank].append(block)
    seconds = tuple(work / speed for work, speed in zip(load, pace, strict=True))
    return LayerWise(tuple(tuple(sorted(blocks)) for blocks in assignment), seconds)


@dataclass(frozen=True)
class Problem:
    """The problem that a plan is searched for; `PlanError` where it makes no sense, with all that is wrong.

    Args:
        profile: seconds and bytes of every block
        batch: rows of a batch
        devices: number of ranks
        speeds: work per second of each rank
        memory_bytes: most bytes that a rank may hold (None: no limit)
    """

    profile: BlockProfile
    batch: int
    devices: int
    speeds: Speeds = None
    memory_bytes: float | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.batch < 1:
            problems.append(f"a batch of {self.batch} rows; expected at least 1")
        if self.devices < 1:
            problems.append(f"{self.devices} devices; expected at least 1")
        if self.speeds is not None and len(self.speeds) != self.devices:
            problems.append(f"{len(self.speeds)} speeds for {self.devices} devices; expected one each")
        problems += [f"a speed of {s}; expected more than 0" for s in self.pace if not 0 < s < math.inf]
        if self.memory_bytes is not None and not self.profile.memory_known:
            problems.append(
                f"a limit of {mebibytes(self.memory_bytes)} a rank for a profile that does not say what blocks hold in "
                "memory; measure one that does (columns teacher_bytes, state_bytes, activation_bytes_per_row)"
            )
        raise_problems(problems, PlanError)

    @property
    def pace(self) -> Sequence[float]:
        """Work per second of each rank."""
        return (1.0,) * self.devices if self.speeds is None else self.speeds

    def seconds_of(self, stage: Stage) -> float:
        """Seconds of one batch in a stage, whose group is as slow as its slowest rank."""
        slowest = min(self.pace[rank] for rank in stage.ranks)
        return stage_seconds(self.profile, stage.first, stage.end, len(stage.ranks), self.batch, slowest)

    def bytes_of(self, stage: Stage) -> int:
        """The most bytes that a rank of a stage holds."""
        return stage_memory_bytes(self.profile, stage.first, stage.end, most_rows(self.batch, len(stage.ranks)))

    def fits(self, stages: Sequence[Stage]) -> bool:
        """Whether no rank of the stages holds more than it may."""
        return self.memory_bytes is None or max(map(self.bytes_of, stages)) <= self.memory_bytes

    def nothing_fits(self, least: float) -> PlanError:
        """The error for a limit that no plan keeps, where the best one has a rank that holds `least` bytes."""
        assert self.memory_bytes is not None, "without a limit everything fits"
        return PlanError(
            f"no plan of {len(self.profile.blocks)} blocks on {self.devices} devices fits into "
            f"{mebibytes(self.memory_bytes)} a rank: the least that any needs is {mebibytes(least)}; "
            f"use more devices or a batch of fewer rows than {self.batch}"
        )


def most_rows(batch: int, k: int) -> int:
    """The most rows of a batch that one of k ranks takes: rows are whole, so some take one more than others."""
    return -(-batch // k)
