"""Seconds and bytes of every block, action and link."""

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
    """What one block costs for one microbatch (in one view). A teacher's backward is 0, and its update 0 when frozen.

    `weight_seconds` is the part of the backward that the gradients of the weights take. In memory, `parameter_bytes` are
    the weights, `training_bytes` what training adds to them (gradients and the optimizer's state), and `stash_bytes` what
    is kept of a microbatch from its forward to its backward.
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
        """Forward and backward of one microbatch."""
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True, slots=True)
class Link:
    """What a transfer between two ranks takes: `latency_seconds` + bytes / `bytes_per_second`.

    `wake_seconds` is how much later a rank that had to wait for a transfer gets on with its work than one that had not:
    its core slept, and works more slowly at first. `handling_seconds` is what each message keeps a rank from its work, at
    either end, for bytes / `handling_bytes_per_second` more: the rest of the transfer is beside the work.
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
        return self.latency_seconds + num_bytes / self.bytes_per_second

    def only(self) -> Link:
        """The link by itself, for ranks that nothing keeps from their work."""
        return Link(self.latency_seconds, self.bytes_per_second)

    def to_json(self) -> dict[str, float | None]:
        """JSON has no infinity: a rate without a limit is null."""
        return {
            name: None if value == float("inf") and name in _RATES else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, data: Any) -> Link:
        """Read back `to_json`; `TypeError` for what is unknown."""
        if not isinstance(data, dict):
            raise TypeError(f"a link is {data!r}, expected an object")
        unlimited = {name: float("inf") for name in _RATES if name in data and data[name] is None}
        return cls(**{**data, **unlimited})


_RATES = ("bytes_per_second", "handling_bytes_per_second")


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of both models' blocks for one microbatch of `rows` samples.

    `views` holds how much longer each view of a sample takes than the blocks say, and how many more bytes it has.
    `interference` is how much longer work takes while every rank computes than while one does alone: 1 on
    separate devices, more where processes share memory bandwidth, caches or cores. `source` says where the figures come
    from, such as the device that they were computed for.
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
        for view in self.views:
            _check_amount("the cost of a view", view)
        if not self.student:
            raise PlanError("costs hold no student block; expected at least one")
        _check_amount("loss_seconds", self.loss_seconds)
        _check_amount("data_seconds", self.data_seconds)
        if not 1.0 <= self.interference < float("inf"):
            raise PlanError(f"interference is {self.interference}, expected 1 or more")

    @property
    def know_memory(self) -> bool:
        """Whether the bytes of the stash are there: costs of earlier versions, or of stages without a model, lack them."""
        return any(block.stash_bytes for block in self.student)

    def microbatch_seconds(self, teacher_views: int = 1) -> float:
        """Work of one microbatch, in all its views, through everything."""
        student, teacher = (sum(block.seconds for block in blocks) for blocks in (self.student, self.teacher))
        return sum(self.views) * student + sum(self.views[:teacher_views]) * teacher + self.loss_seconds

    def with_surroundings(self, link: Link, interference: float) -> Costs:
        """The same blocks with other links and neighbours."""
        return dataclasses.replace(self, link=link, interference=interference)

    def scaled(self, factor: float) -> Costs:
        """Every piece of work `factor` times as long."""

        def longer(block: BlockCosts) -> BlockCosts:
            return dataclasses.replace(
                block,
                forward_seconds=block.forward_seconds * factor,
                backward_seconds=block.backward_seconds * factor,
                weight_seconds=block.weight_seconds * factor,
                update_seconds=block.update_seconds * factor,
            )

        return dataclasses.replace(
            self,
            student=tuple(map(longer, self.student)),
            teacher=tuple(map(longer, self.teacher)),
            loss_seconds=self.loss_seconds * factor,
            data_seconds=self.data_seconds * factor,
        )

    def seconds_of_step(self, microbatches: int, teacher_views: int = 1) -> float:
        """One step on one device."""
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
        """The same seconds in every block and free communication: what theory speaks about. `weight` is a part of
        `backward`.
        """
        student = [BlockCosts(f"student.{i}", forward, backward, weight_seconds=weight) for i in range(num_blocks)]
        frozen = [BlockCosts(f"teacher.{i}", teacher_forward) for i in range(num_blocks)] if teacher else []
        return cls(tuple(student), tuple(frozen), views=(1.0,) * views)

    def stages(self, student_partition: Sequence[int], teacher_partition: Sequence[int]) -> StageCosts:
        """Sum blocks into stages; a partition gives the number of consecutive blocks of each stage."""
        student = _slices(self.student, student_partition, "student")
        teacher = _slices(self.teacher, teacher_partition, "teacher")
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
        return {"version": _VERSION, **dataclasses.asdict(self), "link": self.link.to_json()}

    @classmethod
    def from_json(cls, data: Any) -> Costs:
        """Read back `to_json`; `ConfigError` says what is missing or unknown."""
        if isinstance(data, dict) and "costs" in data:
            data = data["costs"]  # of a plan
        if isinstance(data, dict) and data.get("kind") == "blockwise":
            raise ConfigError(
                "costs: this is a plan for blocks that learn alone; expected costs of a pipeline, or its plan"
            )
        if not isinstance(data, dict) or data.get("version") != _VERSION:
            raise ConfigError(f"costs: expected a JSON object with version {_VERSION}; a run's plan.json holds one")
        rest = {k: v for k, v in data.items() if k != "version"}
        try:
            for role in ("student", "teacher"):
                rest[role] = tuple(BlockCosts(**block) for block in rest.get(role, ()))
            return cls(
                **{**rest, "link": Link.from_json(rest.get("link", {})), "views": tuple(rest.get("views", (1.0,)))}
            )
        except TypeError as error:
            raise ConfigError(f"costs: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Costs:
        """Read a costs file; `ConfigError` when it is missing or not one."""
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except OSError as error:
            raise ConfigError(f"cannot read costs file '{path}': {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"costs file '{path}' is not JSON: {error}") from None


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Seconds of every kind of action on every stage for one microbatch, and bytes of every boundary."""

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
        """Work of one step on each rank, where stage i of both roles sits on rank i."""
        num_stages = len(self.forward)
        teacher, ema = (costs or (0.0,) * num_stages for costs in (self.teacher, self.ema))
        last = num_stages - 1
        seen, taught = sum(self.views), sum(self.views[:teacher_views])
        return [
            num_microbatches * (taught * t + seen * (f + b) + (self.loss if i == last else 0.0))
            + u + e + (0.0 if i else self.data)
            for i, (t, f, b, u, e) in enumerate(zip(teacher, self.forward, self.backward, self.update, ema, strict=True))
        ]  # fmt: skip

    def limit_seconds_per_step(self, num_microbatches: int, teacher_views: int = 1) -> float:
        """The physical limit of a step: the work of the most loaded rank (PAPERS.md, section 3).

        With interference, k ranks together do at most g(k) seconds of work a second, and so take their work / g(k).
        """
        busy = sorted(self.busy_seconds(num_microbatches, teacher_views), reverse=True)
        crowding = (self.interference - 1.0) / max(1, len(busy) - 1)
        together = [k / (1.0 + crowding * (k - 1)) for k in range(1, len(busy) + 1)]
        return max(sum(busy[:k]) / max(1.0, g) for k, g in enumerate(together, start=1))


def _check_amount(what: str, amount: float) -> None:
    if not 0 <= amount < float("inf"):
        raise PlanError(f"{what} is {amount}, expected 0 or more")


def _slices(blocks: tuple[BlockCosts, ...], partition: Sequence[int], role: str) -> list[tuple[BlockCosts, ...]]:
    if any(size < 1 for size in partition):
        raise PlanError(f"{role} partition {list(partition)} has a stage without blocks; each holds at least one")
    if sum(partition) != len(blocks):
        raise PlanError(
            f"{role} partition {list(partition)} adds up to {sum(partition)}, the model has {len(blocks)} blocks"
        )
    starts = [sum(partition[:i]) for i in range(len(partition))]
    return [blocks[start : start + size] for start, size in zip(starts, partition, strict=True)]
