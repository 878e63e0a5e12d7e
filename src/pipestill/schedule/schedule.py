"""Schedules as data: the order in which each rank does its actions, as rows and as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from pipestill.schedule.action import Action
from pipestill.schedule.structure import S, Structure
from pipestill.schedule.text import Fields, numbers, parse_number, parse_numbers

S_co = TypeVar("S_co", bound=Structure, covariant=True)

Row = tuple[Action, ...]
"""The actions of one rank in their order."""

_HEADER = "pipestill schedule 1"


@dataclass(frozen=True, slots=True)
class Schedule(Generic[S_co]):
    """Each rank's ordered actions over a period of one step, repeated for as long as the data lasts.

    In period p, an action written with step s belongs to step p + s: prefetched work carries s > 0. Warm-up
    and cool-down are the same rows, without the actions of steps before the first and after the last, so
    a run of any length is these few rows. `stash[r]` bounds the student's units that rank r holds between
    forward and backward; `run_ahead` bounds how many units the teacher is ahead of the student's
    forward on the same rank. `check` proves both.
    """

    strategy: str
    structure: S_co
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
        """The most steps that an action of a period is ahead of the period's own step."""
        return max((action.step for row in self.rows for action in row), default=0)

    def unroll(self, num_steps: int) -> list[list[Action]]:
        """Each rank's actions of steps 0 to `num_steps` - 1, with absolute steps."""
        periods = range(-self.lookahead, num_steps)
        return [[a.at(p + a.step) for p in periods for a in row if 0 <= p + a.step < num_steps] for row in self.rows]

    def to_text(self) -> str:
        """The schedule as text that `from_text` reads back."""
        lines = [
            _HEADER,
            f"strategy: {self.strategy}",
            *self.structure.lines(),
            f"stash: {numbers(self.stash)}",
            f"run ahead: {self.run_ahead}",
            *(f"rank {r}: {' '.join(map(str, row))}" for r, row in enumerate(self.rows)),
        ]
        return "\n".join(lines) + "\n"

    @staticmethod
    def from_text(text: str, *kinds: type[S]) -> Schedule[S]:
        """Read back what `to_text` wrote; `ValueError` names the line or the action that is wrong.

        `kinds` are the structures that the text may be of: the first whose lines it has, or else the first of all.
        """
        fields = _fields(text)
        kind = next((k for k in kinds if not fields.keys().isdisjoint(k.line_names)), kinds[0])
        try:
            structure = kind.from_lines(fields)
            strategy, stash = fields.pop("strategy"), parse_numbers("stash", fields)
            run_ahead = parse_number("run ahead", fields)
            rows = tuple(tuple(map(Action.parse, fields.pop(f"rank {r}").split())) for r in range(structure.num_ranks))
        except KeyError as error:
            raise ValueError(f"the schedule lacks the line {error}") from None
        if fields:
            raise ValueError(f"the schedule has lines that mean nothing: {', '.join(fields)}")
        return Schedule(strategy, structure, rows, stash, run_ahead)


def _fields(text: str) -> Fields:
    """The lines of a schedule's text below its header, by what stands before their colons."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or lines[0] != _HEADER:
        raise ValueError(f"not a schedule: expected the first line to be '{_HEADER}', got {lines[:1]}")
    fields: Fields = {}
    for line in lines[1:]:
        key, colon, value = line.partition(":")
        if not colon or key in fields:
            raise ValueError(f"not a line of a schedule, or a second one of its kind: '{line}'")
        fields[key] = value.strip()
    return fields
