"""What is computed in a step (`Structure`), and in which order each rank does it (`Schedule`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipestill.schedule.action import Action, Op, Role

Row = tuple[Action, ...]

_HEADER = "pipestill schedule 1"


@dataclass(frozen=True, slots=True)
class Structure:
    """Everything that one step computes, whatever the order.

    `student_ranks[i]` is the rank of student stage i, `teacher_ranks[i]` that of teacher stage i (empty: no
    teacher). `train=False` is forward only, for validation. `serial` adds the one need that makes plain
    inter-layer model parallelism: a microbatch's student starts after its teacher has ended.
    """

    student_ranks: tuple[int, ...]
    teacher_ranks: tuple[int, ...]
    num_microbatches: int
    serial: bool = False
    train: bool = True

    def __post_init__(self) -> None:
        if not self.student_ranks or self.num_microbatches < 1:
            raise ValueError("a structure has at least one student stage and one microbatch")
        used = set(self.student_ranks) | set(self.teacher_ranks)
        if used != set(range(len(used))):
            raise ValueError(f"ranks {sorted(used)} are not 0 to {len(used) - 1}")

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

    def actions(self, step: int = 0) -> Iterator[Action]:
        """Every piece of work of one step, in the order of a plain loop."""
        yield Action(Role.STUDENT, 0, Op.DATA, None, step)
        for m in range(self.num_microbatches):
            for stage in range(len(self.teacher_ranks)):
                yield Action(Role.TEACHER, stage, Op.FORWARD, m, step)
            for stage in range(len(self.student_ranks)):
                yield Action(Role.STUDENT, stage, Op.FORWARD, m, step)
            yield Action(Role.STUDENT, self.last, Op.LOSS, m, step)
            if self.train:
                for stage in reversed(range(len(self.student_ranks))):
                    yield Action(Role.STUDENT, stage, Op.BACKWARD, m, step)
        if self.train:
            for stage in range(len(self.student_ranks)):
                yield Action(Role.STUDENT, stage, Op.UPDATE, None, step)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Each rank's ordered actions over a period of one step, repeated for as long as the data lasts.

    In period p, an action written with step s belongs to step p + s: prefetched work carries s > 0. Warm-up
    and cool-down are the same rows, with the actions of steps before the first and after the last left out, so
    a run of any length is these few rows. `stash[r]` bounds the student microbatches that rank r holds between
    forward and backward; `run_ahead` bounds how many microbatches the teacher is ahead of the student's
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
        head = [
            _HEADER,
            f"strategy: {self.strategy}",
            f"student ranks: {_numbers(s.student_ranks)}",
            f"teacher ranks: {_numbers(s.teacher_ranks)}",
            f"microbatches: {s.num_microbatches}",
            f"serial: {'yes' if s.serial else 'no'}",
            f"train: {'yes' if s.train else 'no'}",
            f"stash: {_numbers(self.stash)}",
            f"run ahead: {self.run_ahead}",
        ]
        rows = [f"rank {r}: {' '.join(map(str, row))}" for r, row in enumerate(self.rows)]
        return "\n".join(head + rows) + "\n"

    @classmethod
    def from_text(cls, text: str) -> Schedule:
        """Read back what `to_text` wrote; `ValueError` names the line or the action that is wrong."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines or lines[0] != _HEADER:
            raise ValueError(f"not a schedule: expected the first line to be '{_HEADER}', got {lines[:1]}")
        fields: dict[str, str] = {}
        for line in lines[1:]:
            key, colon, value = line.partition(":")
            if not colon or key in fields:
                raise ValueError(f"not a line of a schedule, or a second one of its kind: '{line}'")
            fields[key] = value.strip()
        try:
            structure = Structure(
                student_ranks=_parse_numbers("student ranks", fields),
                teacher_ranks=_parse_numbers("teacher ranks", fields),
                num_microbatches=_parse_number("microbatches", fields),
                serial=_parse_truth("serial", fields),
                train=_parse_truth("train", fields),
            )
            strategy, stash = fields.pop("strategy"), _parse_numbers("stash", fields)
            run_ahead = _parse_number("run ahead", fields)
            rows = tuple(tuple(map(Action.parse, fields.pop(f"rank {r}").split())) for r in range(structure.num_ranks))
        except KeyError as error:
            raise ValueError(f"the schedule lacks the line {error}") from None
        if fields:
            raise ValueError(f"the schedule has lines that mean nothing: {', '.join(fields)}")
        return cls(strategy, structure, rows, stash, run_ahead)


def _numbers(values: tuple[int, ...]) -> str:
    return " ".join(map(str, values)) or "none"


def _parse_numbers(key: str, fields: dict[str, str]) -> tuple[int, ...]:
    text = fields.pop(key)
    if text == "none":
        return ()
    if re.fullmatch(r"[0-9]{1,9}( +[0-9]{1,9})*", text) is None:
        raise ValueError(f"'{key}: {text}' in a schedule: expected whole numbers with spaces between, or 'none'")
    return tuple(map(int, text.split()))


def _parse_number(key: str, fields: dict[str, str]) -> int:
    text = fields.pop(key)
    if re.fullmatch("[0-9]{1,9}", text) is None:
        raise ValueError(f"'{key}: {text}' in a schedule: expected a whole number")
    return int(text)


def _parse_truth(key: str, fields: dict[str, str]) -> bool:
    text = fields.pop(key)
    if text not in ("yes", "no"):
        raise ValueError(f"'{key}: {text}' in a schedule: expected yes or no")
    return text == "yes"
