"""Costs: seconds and bytes of every block, stage and link, from which schedules and partitions are planned."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipestill.errors import ConfigError, PlanError

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

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self)[1:]:
            _check_amount(f"block '{self.name}': {item.name}", getattr(self, item.name))
        if self.weight_seconds > self.backward_seconds * (1 + 1e-9):
            raise PlanError(
                f"block '{self.name}': weight_seconds is {self.weight_seconds}, "
                f"more than all of the backward's {self.backward_seconds}"
            )

    @property
    def seconds(self) -> float:
        """Seconds of the forward and the backward of one microbatch."""
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True, slots=True)
class Link:
    """What a transfer between two ranks takes: latency_seconds + bytes / bytes_per_second.

    Most of a transfer is beside the work of both ranks. `wake_seconds` and the handling are what it adds to that work.

    Args:
        latency_seconds: seconds of a message without bytes
        bytes_per_second: rate of the link; infinity for a link that takes no time
        wake_seconds: how much later a rank that had to wait for a message gets on with its work: its core slept, and works
            more slowly at first
        handling_seconds: seconds that each message keeps a rank from its work, at either end
        handling_bytes_per_second: rate at which the message's bytes keep it from its work besides

    Raises:
        PlanError: seconds are below 0 or infinite, or a rate is not above 0
    """

    latency_seconds: float = 0.0
    bytes_per_second: float = float("inf")
    wake_seconds: float = 0.0
    handling_seconds: float = 0.0
    handling_bytes_per_second: float = float("inf")

    def __post_init__(self) -> None:
        for name in ("latency_seconds", "wake_seconds", "handling_seconds"):
            _check_amount(f"link: {name}", getattr(self, name))
        for name in _RATES:
            if not getattr(self, name) > 0:
                raise PlanError(f"link: {name} is {getattr(self, name)}, expected more than 0")

    def seconds(self, num_bytes: float) -> float:
        """Seconds until so many bytes have arrived.

        Args:
            num_bytes: size of the message
        """
        return self.latency_seconds + num_bytes / self.bytes_per_second

    def only(self) -> Link:
        """The link alone, without what a message adds to the work of the ranks."""
        return Link(self.latency_seconds, self.bytes_per_second)

    def to_json(self) -> dict[str, float | None]:
        """The fields by name. JSON has no infinity, so a rate without a limit is null."""
        return {
            name: None if value == float("inf") and name in _RATES else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, data: Any) -> Link:
        """Read back what `to_json` gave.

        Args:
            data: the fields by name

        Raises:
            TypeError: it is no object, or a field is unknown
        """
        if not isinstance(data, dict):
            raise TypeError(f"a link is {data!r}, expected an object")
        unlimited = {name: float("inf") for name in _RATES if name in data and data[name] is None}
        return cls(**{**data, **unlimited})


_RATES = ("bytes_per_second", "handling_bytes_per_second")


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
            _check_amount(what, amount)
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
            times = ("forward_seconds", "backward_seconds", "weight_seconds", "update_seconds")
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

    def stages(self, student_partition: Sequence[int], teacher_partition: Sequence[int]) -> StageCosts:
        """The costs of stages, which are sums over their blocks.

        Args:
            student_partition: number of consecutive student blocks of each stage
            teacher_partition: number of consecutive teacher blocks of each stage; empty without a teacher

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
            loss = self.loss if stage == len(self.forward) else 0.0
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


def _check_amount(what: str, amount: float) -> None:
    """Raise `PlanError` for an amount below 0 or without a limit."""
    if not 0 <= amount < float("inf"):
        raise PlanError(f"{what} is {amount}, expected 0 or more")


def stage_blocks(blocks: tuple[BlockCosts, ...], partition: Sequence[int], role: str) -> list[tuple[BlockCosts, ...]]:
    """The blocks of each stage of a model; `PlanError` where the partition does not fit it."""
    if any(size < 1 for size in partition):
        raise PlanError(f"{role} partition {list(partition)} has a stage without blocks; each holds at least one")
    if sum(partition) != len(blocks):
        raise PlanError(f"{role} partition {list(partition)} adds up to {sum(partition)}, the model has {len(blocks)} blocks")
    starts = [sum(partition[:i]) for i in range(len(partition))]
    return [blocks[start : start + size] for start, size in zip(starts, partition, strict=True)]
