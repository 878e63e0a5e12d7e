"""The protocol by which a kind of training says what its steps consist of, and what each action waits for.

Schedules, their proof and simulation, transfers, texts and pictures ask these questions and know no kind of training.
`pipeline.structure` and `blockwise.structure` answer them; so would a third kind. `needs` and `lane` add what is true of every
kind: transfers, and reads of the data.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from pipestill.schedule.action import Action, Kind, Lane, Op, Role
from pipestill.schedule.text import Fields

S = TypeVar("S", bound="Structure")


@dataclass(frozen=True, slots=True)
class Versions:
    """The weight versions (counts of applied updates) that the forwards of one step read, over all stages."""

    step: int
    student: tuple[int, ...]
    teacher: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of a check; `problems` is empty when the schedule is valid."""

    problems: tuple[str, ...]
    versions: tuple[Versions, ...]
    stash_peak: tuple[int, ...]
    """For each rank, the most units of the student held between their forward and the end of their backward."""
    run_ahead: int
    """How far the teacher is ahead of the student at most: in units on one rank, or in steps in blockwise training."""
    staleness: int
    """Newest version minus the version used, in steps: of the student, and of a teacher that moves."""


class Structure(Protocol):
    """Everything that one step computes, whatever the order, and how its parts depend on each other.

    Actions are written with the step that they belong to. What is asked about is work (`Action.computes`), unless a method says
    otherwise; the read of the data (`Op.DATA`) is a step's first work in every kind of training.
    """

    line_names: ClassVar[tuple[str, ...]]
    """Names of lines by which a schedule's text is recognised as being of this kind."""

    @property
    def num_ranks(self) -> int:
        """The number of ranks that the work is spread over; ranks count from 0."""

    # What a step consists of.

    def actions(self, step: int = 0) -> Iterator[Action]:
        """Every piece of work of one step, in the order of a plain loop: each after all that it needs."""

    def rank_of(self, action: Action) -> int:
        """The rank that computes the payload of `action`, which may be a transfer."""

    # What waits for what, and how results travel.

    def needs(self, work: Action) -> list[Action]:
        """The work whose results `work` uses directly, in the order of a plain loop; of any work but the read of the data."""

    def sharers(self, work: Action) -> list[Action]:
        """The same work on every rank that takes part in a collective with it, itself included; empty where there is none."""

    def lane(self, transfer: Action, destination: int) -> Lane:
        """The channel on which the payload of `transfer`, any work but the read of the data, travels to rank `destination`."""

    def batch_lane(self, destination: int) -> Lane | None:
        """The channel on which tensors of the batch itself follow its row counts to a rank; None where it needs none."""

    @property
    def receives_by_lane(self) -> bool:
        """Whether receives are posted lane by lane in the order of their sends, as `comms` describes."""

    # What is proved and simulated.

    def prove(
        self, rows: Sequence[Sequence[Action]], num_steps: int, lookahead: int, stash: Sequence[int], run_ahead: int
    ) -> Proof:
        """What only this kind can say of a schedule: weight versions, and whether it keeps to its declared bounds.

        `rows` are unrolled over `num_steps` steps and the `lookahead` more that a period reaches ahead.
        """

    def work_seconds(self, work: Action, costs: Any) -> float:
        """Seconds that `work` computes when no other rank disturbs it, under costs of this kind."""

    def transfer_seconds(self, result: Action, destination: int, costs: Any) -> float:
        """Seconds until a result arrives at rank `destination`, latency included, under costs of this kind."""

    # How it is written down and drawn.

    def lines(self) -> list[str]:
        """The lines of a schedule's text that `from_lines` reads back."""

    @classmethod
    def from_lines(cls: type[S], fields: Fields) -> S:
        """Read back `lines`, and take them out of `fields`. `KeyError` names a missing line, `ValueError` a wrong one."""

    def label(self, action: Action) -> str:
        """A short name for the payload of `action` in tables, such as `F0`, unique among the work of a rank in one step."""

    @property
    def by_block(self) -> bool:
        """Whether pictures tell work apart by its block, and not by its microbatch; see `Trace.by_block`."""

    @property
    def batches_per_step(self) -> int:
        """The number of batches that a step takes."""


def needs(action: Action, structure: Structure) -> list[Action]:
    """The work whose results `action` uses directly, in the order in which a plain loop would do it.

    A receive waits for its step's data, since a batch's row counts size the buffer; a send waits for the work it carries.
    Actions of steps before 0 are left to the caller.
    """
    if action.kind is Kind.SEND:
        return [action.payload]
    if action.kind is Kind.RECEIVE:
        return [] if action.op is Op.DATA else [Action(Role.STUDENT, 0, Op.DATA, None, action.step)]
    if action.op is Op.DATA:
        return [action.at(action.step - 1)]
    return structure.needs(action)


def meets(action: Action) -> bool:
    """Whether what an action needs of other ranks reaches it by a collective, and not by sends and receives."""
    return action.op is Op.REDUCE


def lane(transfer: Action, destination: int, structure: Structure) -> Lane:
    """The channel of the edge to rank `destination` on which `transfer` (a send or a receive) travels."""
    return Lane.DATA if transfer.op is Op.DATA else structure.lane(transfer, destination)


def crossings(structure: Structure) -> list[tuple[Action, int, int]]:
    """(work, its rank, another rank that needs its result), once each, in the order of a plain loop's consumers."""
    seen: dict[tuple[Action, int, int], None] = {}
    for consumer in structure.actions():
        destination = structure.rank_of(consumer)
        for need in [] if meets(consumer) else needs(consumer, structure):
            source = structure.rank_of(need)
            if source != destination:
                seen[need.at(0), source, destination] = None
    return list(seen)
