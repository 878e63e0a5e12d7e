"""Costs: seconds and bytes of every block, stage and link, from which schedules and partitions are planned."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipestill.errors import ConfigError, PlanError
from pipestill.link import Link as Link, check_amount

_VERSION = 1


@dataclass(frozen=True, slots=True)
class BlockCosts:
    """Seconds and bytes of one block for one microbatch in one view.

    Args:
        name: the block's name in the model
        forward_seconds: seconds of its forward
        backward_seconds: seconds of its backward; 0 for a teacher's block
        update_seconds: seconds of its optimizer's step; for a momentum teacher's block, of its update; 0 for a frozen one
        parameter_bytes: bytes of its weights
        output_bytes: bytes of its output, which the next block takes
        stash_bytes: bytes that are kept from its forward to its backward
        weight_seconds: the part of `backward_seconds` that the gradients of the weights take
        training_bytes: bytes that training adds to the weights: gradients and the optimizer's state
        feature_seconds: seconds of the feature losses that take the block's output, with their backwards

    Raises:
        PlanError: an amount is below 0 or infinite, or `weight_seconds` is more than all of the backward
    """

    name: str
    forward_seconds: float
    backward_seconds: float = 0.0
    update_seconds: float = 0.0
    parameter_bytes: int = 0
    output_bytes: int = 0
    stash_bytes: int = 0
    weight_seconds: float = 0.0
    training_bytes: int = 0
    feature_seconds: float = 0.0

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self)[1:]:
            check_amount(f"block '{self.name}': {item.name}", getattr(self, item.name))
        if self.weight_seconds > self.backward_seconds * (1 + 1e-9):
            raise PlanError(
                f"block '{self.name}': weight_seconds is {self.weight_seconds}, "
                f"more than all of the backward's {self.backward_seconds}"
            )

    @property
    def seconds(self) -> float:
        """Seconds of the forward and the backward of one microbatch, and of the feature losses between them."""
        return self.forward_seconds + self.backward_seconds + self.feature_seconds


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of both models' blocks for one microbatch.

    Args:
        student: costs of each student block, in order
        teacher: costs of each teacher block, in order; empty without a teacher
        loss_seconds: seconds of the loss of one microbatch
        data_seconds: seconds of reading one batch
        rows: samples of the microbatch that the costs are of
        link: what a transfer between two ranks takes
        interference: how many times as long work takes while every rank computes as while one does alone: 1 on separate
            devices, more where processes share memory bandwidth, caches or cores
        views: for each view of a sample, how many times as long as the blocks say it takes, and as many bytes it has
        source: where the figures come from, such as the device that they were computed for; shown beside plans

    Raises:
        PlanError: there is no student block or no view, or an amount makes no sense
    """

    student: tuple[BlockCosts, ...]
    teacher: tuple[BlockCosts, ...] = ()
    loss_seconds: float = 0.0
    data_seconds: float = 0.0
    rows: int = 1
    link: Link = field(default_factory=Link)
    interference: float = 1.0
    views: tuple[float, ...] = (1.0,)
    source: str = ""

    def __post_init__(self) -> None:
        if not self.views:
            raise PlanError("costs have no view; expected at least one")
        if not self.student:
            raise PlanError("costs hold no student block; expected at least one")
        amounts = [("loss_seconds", self.loss_seconds), ("data_seconds", self.data_seconds)]
        for what, amount in (*(("the cost of a view", view) for view in self.views), *amounts):
            check_amount(what, amount)
        if not 1.0 <= self.interference < float("inf"):
            raise PlanError(f"interference is {self.interference}, expected 1 or more")

    @property
    def know_memory(self) -> bool:
        """Whether the costs tell the bytes of the stash; those of earlier versions, or of stages without a model, do not."""
        return any(block.stash_bytes for block in self.student)

    def microbatch_seconds(self, teacher_views: int = 1) -> float:
        """Seconds of all work of one microbatch in all its views.

        Args:
            teacher_views: how many views the teacher sees
        """
        student, teacher = (sum(block.seconds for block in blocks) for blocks in (self.student, self.teacher))
        return sum(self.views) * student + sum(self.views[:teacher_views]) * teacher + self.loss_seconds

    def with_surroundings(self, link: Link, interference: float) -> Costs:
        """The same blocks on ranks with another link and interference.

        Args:
            link: what a transfer between two ranks takes
            interference: as in `Costs`
        """
        return dataclasses.replace(self, link=link, interference=interference)

    def scaled(self, factor: float) -> Costs:
        """Costs of which all work takes `factor` times as long; transfers take what they took.

        Args:
            factor: times as long
        """

        def longer(block: BlockCosts) -> BlockCosts:
            times = ("forward_seconds", "backward_seconds", "weight_seconds", "update_seconds", "feature_seconds")
            return dataclasses.replace(block, **{name: getattr(block, name) * factor for name in times})

        student, teacher = (tuple(map(longer, blocks)) for blocks in (self.student, self.teacher))
        loss, data = self.loss_seconds * factor, self.data_seconds * factor
        return dataclasses.replace(self, student=student, teacher=teacher, loss_seconds=loss, data_seconds=data)

    def seconds_of_step(self, microbatches: int, teacher_views: int = 1) -> float:
        """Seconds of one step on one device.

        Args:
            microbatches: slices of a batch
            teacher_views: how many views the teacher sees
        """
        updates = sum(block.update_seconds for block in self.student + self.teacher)
        return microbatches * self.microbatch_seconds(teacher_views) + updates

    @classmethod
    def uniform(
        cls,
        num_blocks: int,
        teacher_forward: float,
        forward: float,
        backward: float,
        *,
        weight: float = 0.0,
        teacher: bool = True,
        views: int = 1,
    ) -> Costs:
        """Costs of blocks that are all alike, with transfers that take no time, as theory has them.

        Args:
            num_blocks: blocks of each model
            teacher_forward: seconds of a teacher block's forward
            forward: seconds of a student block's forward
            backward: seconds of its backward
            weight: the part of `backward` that gradients of weights take
            teacher: whether there is one
            views: how many views a sample has
        """
        student = [BlockCosts(f"student.{i}", forward, backward, weight_seconds=weight) for i in range(num_blocks)]
        frozen = [BlockCosts(f"teacher.{i}", teacher_forward) for i in range(num_blocks)] if teacher else []
        return cls(tuple(student), tuple(frozen), views=(1.0,) * views)

    def stages(
        self, student_partition: Sequence[int], teacher_partition: Sequence[int], features: Sequence[tuple[int, int]] = ()
    ) -> StageCosts:
        """The costs of stages, which are sums over their blocks.

        Args:
            student_partition: number of consecutive student blocks of each stage
            teacher_partition: number of consecutive teacher blocks of each stage; empty without a teacher
            features: (student block, teacher block) of each pair that is compared inside the models

        Raises:
            PlanError: a stage is empty, or the numbers do not add up to all blocks
        """
        student = stage_blocks(self.student, student_partition, "student")
        teacher = stage_blocks(self.teacher, teacher_partition, "teacher")
        return StageCosts(
            forward=tuple(sum(b.forward_seconds for b in s) for s in student),
            backward=tuple(sum(b.backward_seconds for b in s) for s in student),
            update=tuple(sum(b.update_seconds for b in s) for s in student),
            weight=tuple(sum(b.weight_seconds for b in s) for s in student),
            teacher=tuple(sum(b.forward_seconds for b in s) for s in teacher),
            ema=tuple(sum(b.update_seconds for b in s) for s in teacher),
            loss=self.loss_seconds,
            data=self.data_seconds,
            activation_bytes=tuple(s[-1].output_bytes for s in student),
            teacher_bytes=tuple(s[-1].output_bytes for s in teacher),
            link=self.link,
            interference=self.interference,
            views=self.views,
            feature_seconds=tuple(sum(b.feature_seconds for b in s) for s in student) if features else (),
            feature_bytes=tuple(self.teacher[block].output_bytes for _, block in features),
            feature_gradient_bytes=tuple(self.student[block].output_bytes for block, _ in features),
        )

    def to_json(self) -> dict[str, Any]:
        """The fields by name, for a costs file."""
        return {"version": _VERSION, **dataclasses.asdict(self), "link": self.link.to_json()}

    @classmethod
    def from_json(cls, data: Any) -> Costs:
        """Read back what `to_json` gave, or the costs inside a pipeline's plan.

        Args:
            data: the fields by name

        Raises:
            ConfigError: a field is missing or unknown, or it is something else
            PlanError: an amount makes no sense
        """
        if isinstance(data, dict) and "costs" in data:
            data = data["costs"]  # of a plan
        if isinstance(data, dict) and data.get("kind") == "blockwise":
            raise ConfigError("costs: this is a blockwise plan; expected costs of a pipeline, or its plan")
        if not isinstance(data, dict) or data.get("version") != _VERSION:
            raise ConfigError(f"costs: expected a JSON object with version {_VERSION}; a run's plan.json holds one")
        rest = {k: v for k, v in data.items() if k != "version"}
        try:
            rest |= {role: tuple(BlockCosts(**block) for block in rest.get(role, ())) for role in ("student", "teacher")}
            return cls(**{**rest, "link": Link.from_json(rest.get("link", {})), "views": tuple(rest.get("views", (1.0,)))})
        except TypeError as error:
            raise ConfigError(f"costs: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Costs:
        """Read a costs file, or the costs of a plan's file.

        Args:
            path: a JSON file

        Raises:
            ConfigError: the file cannot be read, or holds no costs
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except OSError as error:
            raise ConfigError(f"cannot read costs file '{path}': {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"costs file '{path}' is not JSON: {error}") from None


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Seconds of each kind of work on every stage for one microbatch, and bytes of every boundary behind a stage.

    Args:
        forward: seconds of each student stage's forward
        backward: seconds of its whole backward
        update: seconds of its optimizer's step
        teacher: seconds of each teacher stage's forward; empty without a teacher
        loss: seconds of the loss of one microbatch
        data: seconds of reading one batch
        activation_bytes: bytes of each student stage's output; empty for 0
        teacher_bytes: bytes of each teacher stage's output; empty for 0
        link: what a transfer between two ranks takes
        interference: as in `Costs`
        weight: the part of each stage's `backward` that gradients of weights take; empty for 0
        ema: seconds of each momentum teacher's update; empty for 0
        views: as in `Costs`
        feature_seconds: seconds of the feature losses on each student stage for one microbatch; empty for 0
        feature_bytes: for each pair of blocks that is compared, bytes of what the teacher's stage gives; empty for 0
        feature_gradient_bytes: for each such pair, bytes of the gradient that waits for the student's backward; empty for 0
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    update: tuple[float, ...]
    teacher: tuple[float, ...] = ()
    loss: float = 0.0
    data: float = 0.0
    activation_bytes: tuple[int, ...] = ()
    teacher_bytes: tuple[int, ...] = ()
    link: Link = field(default_factory=Link)
    interference: float = 1.0
    weight: tuple[float, ...] = ()
    ema: tuple[float, ...] = ()
    views: tuple[float, ...] = (1.0,)
    feature_seconds: tuple[float, ...] = ()
    feature_bytes: tuple[int, ...] = ()
    feature_gradient_bytes: tuple[int, ...] = ()

    def busy_seconds(self, num_microbatches: int, teacher_views: int = 1) -> list[float]:
        """Seconds of work of one step on each rank, where stage i of both models is on rank i.

        Args:
            num_microbatches: slices of a batch
            teacher_views: how many views the teacher sees
        """
        student_scale, teacher_scale = sum(self.views), sum(self.views[:teacher_views])
        none = (0.0,) * len(self.forward)
        work = zip(self.forward, self.backward, self.update, self.teacher or none, self.ema or none, strict=True)
        seconds = []
        for stage, (forward, backward, update, teacher, ema) in enumerate(work, 1):
            loss = (self.loss if stage == len(self.forward) else 0.0) + (self.feature_seconds or none)[stage - 1]
            microbatch = teacher_scale * teacher + student_scale * (forward + backward) + loss
            seconds.append(num_microbatches * microbatch + update + ema + (self.data if stage == 1 else 0.0))
        return seconds

    def limit_seconds_per_step(self, num_microbatches: int, teacher_views: int = 1) -> float:
        """The least seconds that any schedule takes for a step: the work of the most loaded rank.

        With interference, work of k ranks at a time is slower, so that k ranks do at most g(k) seconds of work a second. The
        k most loaded ranks then take at least their work / g(k) together.

        Args:
            num_microbatches: slices of a batch
            teacher_views: how many views the teacher sees
        """
        busy = sorted(self.busy_seconds(num_microbatches, teacher_views), reverse=True)
        slowdown = (self.interference - 1.0) / max(1, len(busy) - 1)  # by each other rank that computes
        return max(sum(busy[:k]) / max(1.0, k / (1.0 + slowdown * (k - 1))) for k in range(1, len(busy) + 1))


def stage_blocks(blocks: tuple[BlockCosts, ...], partition: Sequence[int], role: str) -> list[tuple[BlockCosts, ...]]:
    """The blocks of each stage of a model; `PlanError` where the partition does not fit it."""
    if any(size < 1 for size in partition):
        raise PlanError(f"{role} partition {list(partition)} has a stage without blocks; each holds at least one")
    if sum(partition) != len(blocks):
        raise PlanError(f"{role} partition {list(partition)} adds up to {sum(partition)}, the model has {len(blocks)} blocks")
    starts = [sum(partition[:i]) for i in range(len(partition))]
    return [blocks[start : start + size] for start, size in zip(starts, partition, strict=True)]
