"""The structure of a pipeline: a student, and its teacher if there is one, in stages that train end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pipestill.costs import StageCosts
from pipestill.schedule.action import Action, Lane, Op, Role
from pipestill.schedule.pipeline.costs import action_seconds, transfer_seconds
from pipestill.schedule.pipeline.needs import lane, needs
from pipestill.schedule.pipeline.proof import prove
from pipestill.schedule.pipeline.step import PipelineStep
from pipestill.schedule.structure import Proof
from pipestill.schedule.text import Fields, numbers, parse_number, parse_numbers, parse_truth, yes_or_no

_RANKS = {"student ranks": "student_ranks", "teacher ranks": "teacher_ranks"}
_COUNTS = {
    "microbatches": "num_microbatches", "views": "views", "teacher views": "teacher_views", "staleness": "staleness",
    "student staleness": "student_staleness", "pieces": "pieces",
}  # fmt: skip
_TRUTHS = {
    "serial": "serial", "train": "train", "batch loss": "batch_loss", "momentum": "momentum", "split": "split",
    "clip": "clip",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PipelineStructure(PipelineStep):
    """Everything that one step of a pipeline computes, and what waits for what (fields: see `PipelineStep`)."""

    line_names: ClassVar[tuple[str, ...]] = tuple(_RANKS)
    receives_by_lane: ClassVar[bool] = False  # a lane's results come step by step, so receives are in their order
    by_block: ClassVar[bool] = False
    batches_per_step: ClassVar[int] = 1

    def needs(self, work: Action) -> list[Action]:
        """The work whose results `work` uses directly, in the order of a plain loop."""
        return needs(work, self)

    def sharers(self, work: Action) -> list[Action]:
        """Nothing: no two ranks share a stage."""
        return []

    def lane(self, transfer: Action, destination: int) -> Lane:
        """The channel on which a result travels to rank `destination`."""
        return lane(transfer, destination, self)

    def batch_lane(self, destination: int) -> Lane | None:
        """Targets of the data go to the rank of the loss; inputs stay on the rank that reads them."""
        return Lane.TARGET if destination == self.student_ranks[self.last] else None

    def prove(
        self, rows: Sequence[Sequence[Action]], num_steps: int, lookahead: int, stash: Sequence[int], run_ahead: int
    ) -> Proof:
        """Weight versions, stash and run-ahead, and where they are not what is declared."""
        return prove(rows, self, num_steps, stash, run_ahead)

    def work_seconds(self, work: Action, costs: StageCosts) -> float:
        """How long `work` computes when no other rank disturbs it."""
        return action_seconds(work, self, costs)

    def transfer_seconds(self, result: Action, destination: int, costs: StageCosts) -> float:
        """How long a result takes to arrive at any other rank."""
        return transfer_seconds(result, self, costs)

    def lines(self) -> list[str]:
        """The lines of a schedule's text that `from_lines` reads back."""
        return [
            *(f"{name}: {numbers(getattr(self, field))}" for name, field in _RANKS.items()),
            *(f"{name}: {getattr(self, field)}" for name, field in _COUNTS.items()),
            *(f"{name}: {yes_or_no(getattr(self, field))}" for name, field in _TRUTHS.items()),
        ]

    @classmethod
    def from_lines(cls, fields: Fields) -> PipelineStructure:
        """Read back `lines`."""
        values: dict[str, Any] = {field: parse_numbers(name, fields) for name, field in _RANKS.items()}
        values |= {field: parse_number(name, fields) for name, field in _COUNTS.items()}
        values |= {field: parse_truth(name, fields) for name, field in _TRUTHS.items()}
        return cls(**values)

    def label(self, action: Action) -> str:
        """`F0`, `t1` for a teacher's forward; where some rank has several stages of one model, `S2F0`."""
        several = any(len(set(ranks)) < len(ranks) for ranks in (self.student_ranks, self.teacher_ranks))
        name = "t" if action.role is Role.TEACHER and action.op is Op.FORWARD else action.op.value
        if several:
            name = f"{action.role.value}{action.stage}{action.op.value}"
        return f"{name}{'' if action.microbatch is None else action.microbatch}"


@dataclass(frozen=True, slots=True)
class Demands:
    """What a task asks of any pipeline's schedule; fields as in `PipelineStep`."""

    momentum: bool = False
    views: int = 1
    teacher_views: int = 1
    batch_loss: bool = False
    clip: bool = False


def pipeline(num_stages: int, num_microbatches: int, *, teacher: bool = True, **rest: Any) -> PipelineStructure:
    """The structure with stage i of both models on rank i. `rest`: further fields of the `PipelineStructure`."""
    ranks = tuple(range(num_stages))
    return PipelineStructure(ranks, ranks if teacher else (), num_microbatches, **rest)
