"""A pipeline's plan: partitions, schedule knobs and the costs they were chosen for; every rank derives its row from it."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipestill.arguments import raise_problems
from pipestill.costs import Costs, StageCosts
from pipestill.errors import ConfigError, PlanError, nearest
from pipestill.plan.memory import memory_bytes_of, refuse_more_than
from pipestill.plan.partition import Partitions, candidate_partitions, momentum_problems, partition_problems
from pipestill.schedule import PIPELINE_STRATEGIES, Proof, Schedule, Trace, check, generate
from pipestill.schedule.pipeline.structure import Demands, PipelineStructure
from pipestill.schedule.simulate import simulate

_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Everything that fixes which rank does what when, together with its schedule, the proof of that, and its times.

    A plan generates and proves its schedule when it is made, so one that exists can run. Equal plans have equal schedules on
    every rank. `make_plan` chooses partitions by itself.

    Args:
        strategy: name of a schedule, one of `PIPELINE_STRATEGIES`
        microbatches: slices of a batch, whose gradients add up
        student_partition: number of consecutive student blocks on each device, such as (3, 3)
        teacher_partition: number of consecutive teacher blocks on each device; () without a teacher
        costs: seconds and bytes of both models' blocks
        run_ahead: most units (microbatches in one view) that the teacher may be ahead of the student on a rank, for strategy
            'fill' (default: as many as it takes)
        staleness: how many steps old the weights of a momentum teacher are, for strategy 'fill' (default: 0)
        split_backward: whether 'fill' separates gradients of weights from those of inputs
        stash: most microbatches that a rank of 'fill' holds from forward to backward: a number, "n", "2n-1" or "all"
            (default: "n", and "2n-1" with split backwards)
        demands: what the task asks of any schedule

    Raises:
        PlanError: counts, partitions or knobs make no sense, all problems at once
        ScheduleError: the checker refuses the generated schedule, which is a bug of its generator
    """

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

    schedule: Schedule[PipelineStructure] = field(init=False, repr=False, compare=False)
    """Each rank's actions in order, proved."""
    proof: Proof = field(init=False, repr=False, compare=False)
    """What the checker established about the schedule."""
    prediction: Trace = field(init=False, repr=False, compare=False)
    """The schedule's actions with the times that the simulator expects."""

    def __post_init__(self) -> None:
        raise_problems(self._problems(), PlanError)
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
            **self.demands.of_stages(self.student_partition, self.teacher_partition),
        )
        object.__setattr__(self, "schedule", schedule)
        object.__setattr__(self, "proof", check(schedule))
        object.__setattr__(self, "prediction", simulate(schedule, self.stage_costs))

    def _problems(self) -> list[str]:
        """Say what is wrong with the name of the strategy, the counts and the partitions."""
        problems = []
        if self.strategy not in PIPELINE_STRATEGIES:
            known = ", ".join(PIPELINE_STRATEGIES)
            problems.append(f"no strategy '{self.strategy}'{nearest(str(self.strategy), PIPELINE_STRATEGIES)}; there are {known}")
        counts = {"microbatches": self.microbatches}
        counts |= {n: v for n, v in (("run_ahead", self.run_ahead), ("staleness", self.staleness)) if v is not None}
        problems += [f"{name} is {count!r}; expected a whole number" for name, count in counts.items() if type(count) is not int]
        problems += partition_problems(self.costs, len(self.student_partition), self.student_partition, self.teacher_partition)
        if not problems and self.demands.momentum:
            problems += momentum_problems(self.costs, self.student_partition, self.teacher_partition)
        if len(self.costs.views) != self.demands.views:
            problems.append(f"costs of {len(self.costs.views)} views for a task with {self.demands.views}")
        pairs = zip(("student", "teacher"), (self.costs.student, self.costs.teacher), strict=True)
        for place, (role, blocks) in enumerate(pairs):
            numbers = [pair[place] for pair in self.demands.features if not 0 <= pair[place] < len(blocks)]
            problems += [f"a feature of {role} block {number} for costs of {len(blocks)} {role} blocks" for number in numbers]
        if not problems and self.microbatches < 1:
            problems.append(f"{self.microbatches} microbatches; expected at least 1 (--microbatches)")
        return problems

    @property
    def num_devices(self) -> int:
        """The number of ranks, each of which is one device and one stage of both models."""
        return len(self.student_partition)

    @cached_property
    def stage_costs(self) -> StageCosts:
        """The blocks' costs summed up over each stage."""
        return self.costs.stages(self.student_partition, self.teacher_partition, self.demands.features)

    @cached_property
    def memory_bytes(self) -> tuple[int, ...]:
        """What each rank is expected to hold at most; () where the costs do not tell."""
        return memory_bytes_of(self.schedule, self.costs, self.stage_costs, self.student_partition, self.teacher_partition)

    @property
    def limit_seconds_per_step(self) -> float:
        """The work of the most loaded rank: no schedule of these partitions is faster."""
        return self.stage_costs.limit_seconds_per_step(self.microbatches, self.demands.teacher_views)

    def with_stash(self, stash: int | str | None) -> Plan:
        """The same plan, its bound on the stash given by another word for the same number of units.

        Args:
            stash: the other word.
        """
        plan = copy.copy(self)
        object.__setattr__(plan, "stash", stash)
        return plan

    def to_json(self) -> dict[str, Any]:
        """Write what the plan was made from, for `from_json`, which makes the same plan again."""
        given = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.init}
        return {"version": _VERSION, **given, "costs": self.costs.to_json(), "demands": dataclasses.asdict(self.demands)}

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Make the plan that `to_json` wrote again.

        Args:
            text: a JSON object, as text

        Raises:
            ConfigError: the text is no plan; the message says what is wrong with it
            PlanError: it is one that makes no sense
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the plan is not JSON: {error}") from None
        if not isinstance(data, dict) or data.pop("version", None) != _VERSION:
            raise ConfigError(f"the plan is not one of version {_VERSION}")
        try:
            for key in ("student_partition", "teacher_partition"):
                data[key] = tuple(data[key])
            given = {**data, "costs": Costs.from_json(data["costs"]), "demands": Demands(**data.get("demands", {}))}
            return cls(**given)
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
    demands: Demands = Demands(),  # noqa: B008 - frozen
    memory_bytes: float | None = None,
    **knobs: Any,
) -> Plan:
    """Make the plan whose partitions level the work of `costs`, or that has the partitions given by hand.

    Args:
        costs: seconds and bytes of both models' blocks
        devices: number of ranks, each of which is one device and one stage of both models
        strategy: name of a schedule, one of `PIPELINE_STRATEGIES`
        microbatches: slices of a batch, whose gradients add up
        student_partition: number of student blocks on each device (default: level)
        teacher_partition: number of teacher blocks on each device (default: level)
        demands: what the task asks of any schedule
        memory_bytes: most bytes that a rank may hold (default: no limit)
        knobs: run_ahead, staleness, split_backward and stash, as in `Plan`

    Raises:
        PlanError: a count is below 1, a partition does not add up or fit the devices, the strategy does not have such knobs,
            or a rank would hold more than `memory_bytes`
    """
    check_counts(devices, microbatches)
    problems = partition_problems(costs, devices, student_partition, teacher_partition)
    if not problems and demands.momentum and student_partition is not None:
        problems = momentum_problems(costs, student_partition, teacher_partition)
    raise_problems(problems, PlanError)
    candidates = [
        Partitions(
            level.student if student_partition is None else tuple(student_partition),
            level.teacher if teacher_partition is None else tuple(teacher_partition),
        )
        for level in candidate_partitions(costs, devices, demands, strategy, microbatches, student_partition)
    ]
    plans = [
        Plan(strategy, microbatches, *partitions, costs, demands=demands, **knobs) for partitions in dict.fromkeys(candidates)
    ]
    plan = min(plans, key=lambda plan: plan.prediction.seconds_per_step)
    if memory_bytes is not None:
        refuse_more_than(memory_bytes, plan.memory_bytes)
    return plan


def check_counts(devices: int, microbatches: int) -> None:
    """Raise `PlanError` for fewer than one device or microbatch."""
    for count, what, option in ((devices, "devices", "--devices"), (microbatches, "microbatches", "--microbatches")):
        if count < 1:
            raise PlanError(f"{count} {what}; expected at least 1 ({option})")
