"""Schedules as data: the order in which each rank does its actions, as rows."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from pipestill.schedule.action import Action
from pipestill.schedule.structure import Structure

S_co = TypeVar("S_co", bound=Structure, covariant=True)

Row = tuple[Action, ...]
"""The actions of one rank in their order."""


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
