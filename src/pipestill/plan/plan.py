"""A plan: partition, schedule knobs and the costs they were chosen for; every rank derives its row from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipestill.costs import Costs, StageCosts
from pipestill.errors import ConfigError, PlanError, nearest
from pipestill.plan.balance import balance
from pipestill.plan.memory import memory_bytes_of
from pipestill.schedule import PIPELINE_STRATEGIES, Proof, Schedule, Trace, check, generate
from pipestill.schedule.schedule import Demands
from pipestill.schedule.simulate import simulate

_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Everything that fixes who does what when. Equal plans give equal schedules on every rank."""

    strategy: str
    microbatches: int
    student_partition: tuple[int, ...]
    teacher_partition: tuple[int, ...]
    costs: Costs
    run_ahead: int | None = None
    staleness: int | None = None
    split_backward: bool = False
    stash: int | str | None = None
    demands: Demands = field(default_factory=Demands)

    def __post_init__(self) -> None:
        """Raises `PlanError` when counts, partitions or the strategy's name make no sense."""
        problems = []
        if self.strategy not in PIPELINE_STRATEGIES:
            known = ", ".join(PIPELINE_STRATEGIES)
            problems.append(
                f"no strategy '{self.strategy}'{nearest(str(self.strategy), PIPELINE_STRATEGIES)}; there are {known}"
            )
        counts = {"microbatches": self.microbatches}
        counts |= {n: v for n, v in (("run_ahead", self.run_ahead), ("staleness", self.staleness)) if v is not None}
        problems += [
            f"{name} is {count!r}; expected a whole number" for name, count in counts.items() if type(count) is not int
        ]
        problems += _partition_problems(
            self.costs, len(self.student_partition), self.student_partition, self.teacher_partition
        )
        if not problems and self.demands.momentum:
            problems += _momentum_problems(self.costs, self.student_partition, self.teacher_partition)
        if len(self.costs.views) != self.demands.views:
            problems.append(f"costs of {len(self.costs.views)} views for a task with {self.demands.views}")
        if not problems and self.microbatches < 1:
            problems.append(f"{self.microbatches} microbatches; expected at least 1 (--microbatches)")
        if problems:
            raise PlanError("; ".join(problems))

    @property
    def num_devices(self) -> int:
        return len(self.student_partition)

    @cached_property
    def stage_costs(self) -> StageCosts:
        return self.costs.stages(self.student_partition, self.teacher_partition)

    @cached_property
    def schedule(self) -> Schedule:
        """The proved schedule."""
        schedule = generate(
            self.strategy,
            self.num_devices,
            self.microbatches,
            teacher=bool(self.teacher_partition),
            costs=self.stage_costs if self.strategy == "fill" else None,
            run_ahead=self.run_ahead,
            staleness=self.staleness,
            split_backward=self.split_backward,
            stash=self.stash,
            **dataclasses.asdict(self.demands),
        )
        check(schedule)
        return schedule

    @cached_property
    def proof(self) -> Proof:
        """What the checker established about the schedule."""
        return check(self.schedule)

    @cached_property
    def prediction(self) -> Trace:
        """What the simulator expects."""
        return simulate(self.schedule, self.stage_costs)

    @cached_property
    def memory_bytes(self) -> tuple[int, ...]:
        """What each rank is expected to hold at most; () where the costs do not tell."""
        return memory_bytes_of(self.schedule, self.costs, self.student_partition, self.teacher_partition)

    @property
    def limit_seconds_per_step(self) -> float:
        """No schedule of this partition is faster: the work of its most loaded rank."""
        return self.stage_costs.limit_seconds_per_step(self.microbatches, self.demands.teacher_views)

    def to_json(self) -> dict[str, Any]:
        return {"version": _VERSION, **dataclasses.asdict(self), "costs": self.costs.to_json()}

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read back a plan; `ConfigError` says what is wrong with it."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the plan is not JSON: {error}") from None
        if not isinstance(data, dict) or data.pop("version", None) != _VERSION:
            raise ConfigError(f"the plan is not one of version {_VERSION}")
        try:
            for key in ("student_partition", "teacher_partition"):
                data[key] = tuple(data[key])
            return cls(
                **{**data, "costs": Costs.from_json(data["costs"]), "demands": Demands(**data.get("demands", {}))}
            )
        except (TypeError, KeyError) as error:
            raise ConfigError(f"the plan lacks or does not know: {error}") from None


def make_plan(
    costs: Costs,
    *,
    devices: int,
    strategy: str,
    microbatches: int,
    student_partition: Sequence[int] | None = None,
    teacher_partition: Sequence[int] | None = None,
    run_ahead: int | None = None,
    staleness: int | None = None,
    split_backward: bool = False,
    stash: int | str | None = None,
    demands: Demands = Demands(),  # noqa: B008 - frozen
) -> Plan:
    """The plan with a level partition from `costs`, or with the partitions given by hand.

    Raises `PlanError` when a count is below 1, or a partition does not add up or fit the devices.
    """
    if devices < 1:
        raise PlanError(f"{devices} devices; expected at least 1 (--devices)")
    if microbatches < 1:
        raise PlanError(f"{microbatches} microbatches; expected at least 1 (--microbatches)")
    problems = _partition_problems(costs, devices, student_partition, teacher_partition)
    if not problems and demands.momentum and student_partition is not None:
        followed = _following(costs, student_partition) if teacher_partition is None else teacher_partition
        problems = _momentum_problems(costs, student_partition, followed)
    if problems:
        raise PlanError("; ".join(problems))
    plans = [
        Plan(
            strategy=strategy,
            microbatches=microbatches,
            student_partition=tuple(student_cut if student_partition is None else student_partition),
            teacher_partition=tuple(teacher_cut if teacher_partition is None else teacher_partition),
            costs=costs,
            run_ahead=run_ahead,
            staleness=staleness,
            split_backward=split_backward,
            stash=stash,
            demands=demands,
        )
        for student_cut, teacher_cut in _cuts(costs, devices, strategy, microbatches, demands, student_partition)
    ]
    return min(plans, key=lambda plan: plan.prediction.seconds_per_step) if len(plans) > 1 else plans[0]


def _following(costs: Costs, student: Sequence[int]) -> tuple[int, ...]:
    """A momentum teacher's partition: each of its blocks where the student's is."""
    tail = len(costs.student) - len(costs.teacher)
    return (*student[:-1], student[-1] - tail)


def _momentum_problems(costs: Costs, student: Sequence[int], teacher: Sequence[int]) -> list[str]:
    tail = len(costs.student) - len(costs.teacher)
    if student[-1] <= tail:
        need = f"the last stage holds the {tail} blocks that the teacher lacks, and at least one block before them"
        return [f"student partition {list(student)}: {need}"]
    if tuple(teacher) != _following(costs, student):
        need = f"a momentum teacher's blocks are where the student's are, so it is {list(_following(costs, student))}"
        return [f"teacher partition {list(teacher)}: {need}; leave it out"]
    return []


def _partition_problems(
    costs: Costs, devices: int, student: Sequence[int] | None, teacher: Sequence[int] | None
) -> list[str]:
    """What is wrong with partitions given by hand or by a file; None is not looked at."""
    problems = []
    for role, partition, num_blocks in (
        ("student", student, len(costs.student)),
        ("teacher", teacher, len(costs.teacher)),
    ):
        if partition is None or (num_blocks == 0 and not partition):
            continue
        shown = f"{role} partition {list(partition)}"
        if any(type(size) is not int for size in partition):
            problems.append(f"{shown} holds something else than whole numbers")
            continue
        if num_blocks == 0:
            problems.append(f"{shown} for a task without a {role}; leave it out")
        elif len(partition) != devices:
            problems.append(f"{shown} has {len(partition)} stages for {devices} devices")
        elif min(partition) < 1:
            problems.append(f"{shown} has an empty stage; every stage needs a block")
        if num_blocks and sum(partition) != num_blocks:
            problems.append(f"{shown} adds up to {sum(partition)}, but the {role} has {num_blocks} blocks")
    return problems


def level(
    costs: Costs, devices: int, demands: Demands, *, student_weight: float
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Partitions of a student and a frozen teacher that are levelled together (see `balance`)."""
    return balance(*_loads(costs, demands), devices, student_weight=student_weight)


def _loads(costs: Costs, demands: Demands) -> tuple[list[float], list[float]]:
    """Seconds of each block of student and teacher for one microbatch in all its views."""
    views, taught = sum(costs.views), sum(costs.views[: demands.teacher_views])
    student = [b.seconds * views for b in costs.student]
    student[-1] += costs.loss_seconds
    return student, [b.forward_seconds * taught for b in costs.teacher]


def _cuts(
    costs: Costs,
    devices: int,
    strategy: str,
    microbatches: int,
    demands: Demands,
    given: Sequence[int] | None,
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The partitions worth a simulation: both models levelled together, and, where the teacher runs first, each alone.

    A momentum teacher goes with the student, whose last stage holds at least one block that the teacher has too.
    """
    student, teacher = _loads(costs, demands)
    if demands.momentum:
        if given is not None:
            return [(tuple(given), _following(costs, given))]
        both = [s + t for s, t in zip(student, [*teacher, *[0.0] * (len(student) - len(teacher))], strict=True)]
        last = len(teacher) - 1
        merged = [*both[:last], sum(both[last:])]
        if len(merged) < devices:
            raise PlanError(
                f"{devices} devices, but the teacher has {len(merged)} blocks, and every stage holds one of these; "
                f"use at most {len(merged)} devices or cut the models into more blocks"
            )
        cut = balance(merged, [], devices)[0]
        cut = (*cut[:-1], cut[-1] + len(both) - len(merged))
        return [(cut, _following(costs, cut))]
    path = (microbatches + devices - 1) / microbatches
    cuts = [level(costs, devices, demands, student_weight=path)]
    if strategy in ("gpipe", "1f1b") and teacher:
        cuts.append((balance(student, [], devices)[0], balance(teacher, [], devices)[0]))
    return cuts
