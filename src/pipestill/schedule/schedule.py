"""What is computed in a step (`PipelineStructure`), and in which order each rank does it (`Schedule`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.blockwise.structure import BlockwiseStructure
from pipestill.schedule.text import (
    Fields,
    block_lines,
    numbers,
    of_blocks,
    parse_blocks,
    parse_number,
    parse_numbers,
    parse_truth,
    yes_or_no,
)

Row = tuple[Action, ...]

_HEADER = "pipestill schedule 1"
_TRUTHS = {
    "serial": "serial", "train": "train", "batch loss": "batch_loss", "momentum": "momentum", "split": "split",
    "clip": "clip",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PipelineStructure:
    """Everything that one step computes, whatever the order.

    `student_ranks[i]` is the rank of student stage i, `teacher_ranks[i]` that of teacher stage i (empty: no
    teacher). `train=False` is forward only, for validation. `serial` adds the needs that make plain
    inter-layer model parallelism: every pass through a model starts after the one before it in a plain loop has ended.

    A sample may have several `views`, of which the teacher sees the first `teacher_views`. Every pass of one microbatch
    in one view is a *unit*, counted microbatch by microbatch: unit u of the student is view u % views of microbatch
    u // views. The loss takes all views of a microbatch together, or with `batch_loss` those of the whole batch.

    `momentum`: after a stage's update, its teacher's weights move towards it, on the same rank (so student and teacher
    have the same stages). The teacher's forwards of step k then read the version after k - `staleness` such moves,
    and with `student_staleness` the student's read that after k - 1 updates. `split`: backwards are two halves.
    `clip`: updates wait for the gradients of all stages, whose norm they share. `pieces`: into how many of this structure's
    microbatches one that costs were measured for is cut.
    """

    student_ranks: tuple[int, ...]
    teacher_ranks: tuple[int, ...]
    num_microbatches: int
    serial: bool = False
    train: bool = True
    views: int = 1
    teacher_views: int = 1
    batch_loss: bool = False
    momentum: bool = False
    staleness: int = 0
    student_staleness: int = 0
    split: bool = False
    clip: bool = False
    pieces: int = 1

    def __post_init__(self) -> None:
        if not self.student_ranks or self.num_microbatches < 1:
            raise ValueError("a structure has at least one student stage and one microbatch")
        used = set(self.student_ranks) | set(self.teacher_ranks)
        if used != set(range(len(used))):
            raise ValueError(f"ranks {sorted(used)} are not 0 to {len(used) - 1}")
        if self.pieces < 1 or self.num_microbatches % self.pieces:
            raise ValueError(f"{self.num_microbatches} microbatches are not cut into {self.pieces} pieces each")
        if not 1 <= self.teacher_views <= self.views:
            raise ValueError(f"a teacher that sees {self.teacher_views} of {self.views} views; expected 1 to all")
        if self.momentum and self.teacher_ranks != self.student_ranks:
            raise ValueError("a momentum teacher's stages sit where the student's do")
        if min(self.staleness, self.student_staleness) < 0 or max(self.staleness, self.student_staleness) > 1:
            raise ValueError(f"staleness {self.staleness} and {self.student_staleness}; expected 0 or 1")
        if (self.staleness or self.student_staleness) and not self.momentum:
            raise ValueError("only a momentum teacher's weights, and then the student's, can be stale")

    @property
    def num_ranks(self) -> int:
        return 1 + max(self.student_ranks + self.teacher_ranks)

    @property
    def last(self) -> int:
        """The student's last stage, which holds the loss."""
        return len(self.student_ranks) - 1

    def rank_of(self, action: Action) -> int:
        """The rank that computes the payload of `action`."""
        ranks = self.student_ranks if action.role is Role.STUDENT else self.teacher_ranks
        return ranks[action.stage]

    def stages_of(self, rank: int, role: Role) -> list[int]:
        """The stages of `role` that `rank` holds."""
        ranks = self.student_ranks if role is Role.STUDENT else self.teacher_ranks
        return [stage for stage, owner in enumerate(ranks) if owner == rank]

    def num_units(self, role: Role) -> int:
        """How many passes through a model one step has."""
        return self.num_microbatches * (self.views if role is Role.STUDENT else self.teacher_views)

    @property
    def num_losses(self) -> int:
        """How often the loss is evaluated in one step."""
        return 1 if self.batch_loss else self.num_microbatches

    def units_of_loss(self, loss: int, role: Role) -> range:
        """The units whose outputs the loss of this number takes."""
        units = self.num_units(role) // self.num_losses
        return range(loss * units, (loss + 1) * units)

    def loss_of_unit(self, unit: int) -> int:
        """The number of the loss that takes a student's unit."""
        return unit // (self.num_units(Role.STUDENT) // self.num_losses)

    @property
    def backward_ops(self) -> tuple[Op, ...]:
        """What a backward consists of, in its order."""
        return (Op.INPUT, Op.WEIGHT) if self.split else (Op.BACKWARD,)

    def passes(self, step: int = 0) -> Iterator[tuple[Role, Op, int]]:
        """Every pass of a step in the order of a plain loop: (whose, forward, loss or backward, unit)."""
        num_groups = 1 if self.batch_loss else self.num_microbatches
        size = self.num_microbatches // num_groups
        for group in range(num_groups):
            for m in range(group * size, (group + 1) * size):
                if self.teacher_ranks:
                    yield from (
                        (Role.TEACHER, Op.FORWARD, m * self.teacher_views + v) for v in range(self.teacher_views)
                    )
                yield from ((Role.STUDENT, Op.FORWARD, m * self.views + v) for v in range(self.views))
            yield Role.STUDENT, Op.LOSS, group
            if self.train:
                yield from ((Role.STUDENT, self.backward_ops[0], u) for u in self.units_of_loss(group, Role.STUDENT))

    def actions(self, step: int = 0) -> Iterator[Action]:
        """Every piece of work of one step, in the order of a plain loop."""
        yield Action(Role.STUDENT, 0, Op.DATA, None, step)
        stages = range(len(self.student_ranks))
        for role, op, unit in self.passes():
            if op is Op.LOSS:
                yield Action(role, self.last, op, unit, step)
            elif op is Op.FORWARD:
                for stage in stages if role is Role.STUDENT else range(len(self.teacher_ranks)):
                    yield Action(role, stage, op, unit, step)
            else:
                for stage in reversed(stages):
                    for half in self.backward_ops:
                        yield Action(role, stage, half, unit, step)
        if self.train:
            if self.clip:
                yield from (Action(Role.STUDENT, stage, Op.NORM, None, step) for stage in stages)
            for stage in stages:
                yield Action(Role.STUDENT, stage, Op.UPDATE, None, step)
                if self.momentum:
                    yield Action(Role.TEACHER, stage, Op.EMA, None, step)


@dataclass(frozen=True, slots=True)
class Demands:
    """What a task asks of any schedule; fields as in `PipelineStructure`."""

    momentum: bool = False
    views: int = 1
    teacher_views: int = 1
    batch_loss: bool = False
    clip: bool = False


def pipeline(num_stages: int, num_microbatches: int, *, teacher: bool = True, **rest: Any) -> PipelineStructure:
    """Stage i of both models on rank i. `rest`: further fields of the `PipelineStructure`."""
    ranks = tuple(range(num_stages))
    return PipelineStructure(ranks, ranks if teacher else (), num_microbatches, **rest)


Structure = PipelineStructure | BlockwiseStructure


@dataclass(frozen=True, slots=True)
class Schedule:
    """Each rank's ordered actions over a period of one step, repeated for as long as the data lasts.

    In period p, an action written with step s belongs to step p + s: prefetched work carries s > 0. Warm-up
    and cool-down are the same rows, with the actions of steps before the first and after the last left out, so
    a run of any length is these few rows. `stash[r]` bounds the student's units that rank r holds between
    forward and backward; `run_ahead` bounds how many units the teacher is ahead of the student's
    forward on the same rank. Both are proved by `check`.
    """

    strategy: str
    structure: Structure
    rows: tuple[Row, ...]
    stash: tuple[int, ...]
    run_ahead: int

    def __post_init__(self) -> None:
        num_ranks = self.structure.num_ranks
        if len(self.rows) != num_ranks or len(self.stash) != num_ranks:
            raise ValueError(f"{len(self.rows)} rows and {len(self.stash)} stash bounds for {num_ranks} ranks")
        late = [str(action) for row in self.rows for action in row if action.step < 0]
        if late:
            raise ValueError(f"steps in a period count from 0, its oldest step; got {', '.join(late)}")

    @property
    def pipeline(self) -> PipelineStructure:
        """The structure of a schedule whose models run end to end."""
        assert isinstance(self.structure, PipelineStructure)
        return self.structure

    @property
    def lookahead(self) -> int:
        """How many steps ahead of its own step a period reaches."""
        return max((action.step for row in self.rows for action in row), default=0)

    def unroll(self, num_steps: int) -> list[list[Action]]:
        """Each rank's actions of steps 0 to `num_steps` - 1, with absolute steps."""
        periods = range(-self.lookahead, num_steps)
        return [[a.at(p + a.step) for p in periods for a in row if 0 <= p + a.step < num_steps] for row in self.rows]

    def to_text(self) -> str:
        """The schedule as text that `from_text` reads back."""
        s = self.structure
        lines = [
            _HEADER,
            f"strategy: {self.strategy}",
            *(block_lines(s) if isinstance(s, BlockwiseStructure) else _lines(s)),
            f"stash: {numbers(self.stash)}",
            f"run ahead: {self.run_ahead}",
            *(f"rank {r}: {' '.join(map(str, row))}" for r, row in enumerate(self.rows)),
        ]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_text(cls, text: str) -> Schedule:
        """Read back what `to_text` wrote; `ValueError` names the line or the action that is wrong."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines or lines[0] != _HEADER:
            raise ValueError(f"not a schedule: expected the first line to be '{_HEADER}', got {lines[:1]}")
        fields: Fields = {}
        for line in lines[1:]:
            key, colon, value = line.partition(":")
            if not colon or key in fields:
                raise ValueError(f"not a line of a schedule, or a second one of its kind: '{line}'")
            fields[key] = value.strip()
        try:
            structure: Structure = parse_blocks(fields) if of_blocks(fields) else _parse(fields)
            strategy, stash = fields.pop("strategy"), parse_numbers("stash", fields)
            run_ahead = parse_number("run ahead", fields)
            rows = tuple(tuple(map(Action.parse, fields.pop(f"rank {r}").split())) for r in range(structure.num_ranks))
        except KeyError as error:
            raise ValueError(f"the schedule lacks the line {error}") from None
        if fields:
            raise ValueError(f"the schedule has lines that mean nothing: {', '.join(fields)}")
        return cls(strategy, structure, rows, stash, run_ahead)


def _lines(s: PipelineStructure) -> list[str]:
    return [
        f"student ranks: {numbers(s.student_ranks)}",
        f"teacher ranks: {numbers(s.teacher_ranks)}",
        f"microbatches: {s.num_microbatches}",
        f"views: {s.views}",
        f"teacher views: {s.teacher_views}",
        f"staleness: {s.staleness}",
        f"student staleness: {s.student_staleness}",
        f"pieces: {s.pieces}",
        *(f"{name}: {yes_or_no(getattr(s, field))}" for name, field in _TRUTHS.items()),
    ]


def _parse(fields: Fields) -> PipelineStructure:
    return PipelineStructure(
        student_ranks=parse_numbers("student ranks", fields),
        teacher_ranks=parse_numbers("teacher ranks", fields),
        num_microbatches=parse_number("microbatches", fields),
        views=parse_number("views", fields),
        teacher_views=parse_number("teacher views", fields),
        staleness=parse_number("staleness", fields),
        student_staleness=parse_number("student staleness", fields),
        pieces=parse_number("pieces", fields),
        **{field: parse_truth(name, fields) for name, field in _TRUTHS.items()},
    )
