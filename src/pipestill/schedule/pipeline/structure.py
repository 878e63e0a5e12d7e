"""The structure of a pipeline: a student, and its teacher if there is one, in stages that train end to end."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields as fields_of
from itertools import accumulate
from typing import Any, ClassVar, get_type_hints

from pipestill.costs import StageCosts
from pipestill.schedule.action import Action, Lane, Op, Role
from pipestill.schedule.pipeline.needs import lane, needs
from pipestill.schedule.pipeline.step import PipelineStep
from pipestill.schedule.structure import Proof, Versions
from pipestill.schedule.text import Fields, numbers, pairs, parse_number, parse_numbers, parse_pairs, parse_truth, yes_or_no

_FORMS: dict[Any, tuple[Callable[[Any], str], Callable[[str, Fields], Any]]] = {
    tuple[int, ...]: (numbers, parse_numbers), int: (str, parse_number), bool: (yes_or_no, parse_truth),
    tuple[tuple[int, int], ...]: (pairs, parse_pairs),
}  # fmt: skip
"""How fields of each type are written in a schedule's text, and read from it; in the order of its lines."""

_TOLD_IF_ANY = ("features", "ties")
"""Fields that the text leaves out where they are empty."""


@dataclass(frozen=True, slots=True)
class PipelineStructure(PipelineStep):
    """Everything that one step of a pipeline computes, and what waits for what (fields: see `PipelineStep`)."""

    line_names: ClassVar[tuple[str, ...]] = ("student ranks", "teacher ranks")
    receives_by_lane: ClassVar[bool] = False  # a lane's results come step by step, so receives are in their order
    by_block: ClassVar[bool] = False
    batches_per_step: ClassVar[int] = 1

    def needs(self, work: Action) -> list[Action]:
        """The work whose results `work` uses directly, in the order of a plain loop."""
        return needs(work, self)

    def sharers(self, work: Action) -> list[Action]:
        """Give nothing: no two ranks share a stage."""
        return []

    def lane(self, transfer: Action, destination: int) -> Lane:
        """The channel on which a result travels to rank `destination`."""
        return lane(transfer, destination, self)

    def batch_lane(self, destination: int) -> Lane | None:
        """Targets of the data go to the ranks that have a loss; inputs stay on the rank that reads them."""
        return Lane.TARGET if destination in [self.student_ranks[stage] for stage in self.loss_stages] else None

    def prove(
        self, rows: Sequence[Sequence[Action]], num_steps: int, lookahead: int, stash: Sequence[int], run_ahead: int
    ) -> Proof:
        """Weight versions, stash and run-ahead, and where they are not what is declared."""
        versions, problems = _versions(rows, self)
        peaks, most_ahead, bound_problems = _bounds(rows, self, stash, run_ahead)
        moving = [v.student + (v.teacher if self.momentum else ()) for v in versions]
        staleness = max((v.step - used for v, read in zip(versions, moving, strict=True) for used in read), default=0)
        return Proof((*problems, *bound_problems), versions[:num_steps], peaks, most_ahead, staleness)

    def work_seconds(self, work: Action, costs: StageCosts) -> float:
        """Seconds that `work` computes when no other rank disturbs it."""
        stage = work.stage
        if work.op is Op.LOSS:
            seconds = costs.loss if stage == self.last else 0.0
            if self.features and costs.feature_seconds:
                seconds += costs.feature_seconds[stage]
            return seconds * self.num_microbatches / self.num_losses / self.pieces
        if work.microbatch is None:  # a norm takes no time
            ema = costs.ema[stage] if costs.ema else 0.0
            return {Op.DATA: costs.data, Op.UPDATE: costs.update[stage], Op.EMA: ema}.get(work.op, 0.0)
        weight = costs.weight[stage] if costs.weight else 0.0
        if work.op is Op.FORWARD:
            seconds = (costs.forward if work.role is Role.STUDENT else costs.teacher)[stage]
        else:
            whole = costs.backward[stage]
            seconds = {Op.BACKWARD: whole, Op.INPUT: whole - weight, Op.WEIGHT: weight}[work.op]
        return seconds * self.unit_scale(work, costs)

    def transfer_seconds(self, result: Action, destination: int, costs: StageCosts) -> float:
        """Seconds until a result arrives at another rank: a boundary's activations, their gradients, or features."""
        num_bytes = self.feature_bytes(result, destination, costs)
        if result.role is Role.STUDENT or self.passes_output(result.stage, destination):
            num_bytes += self.result_bytes(result, costs)
        return costs.link.seconds(num_bytes)

    def result_bytes(self, result: Action, costs: StageCosts) -> float:
        """Bytes of what a forward gives to the stage behind it, or a backward to the one before; 0 for other work."""
        if result.microbatch is None or result.op is Op.LOSS:
            return 0
        boundary = result.stage if result.op is Op.FORWARD else result.stage - 1
        sizes = costs.activation_bytes if result.role is Role.STUDENT else costs.teacher_bytes
        return sizes[boundary] * self.unit_scale(result, costs) if sizes and boundary >= 0 else 0

    def feature_bytes(self, result: Action, destination: int, costs: StageCosts) -> float:
        """Bytes of what a teacher's forward gives to the features of the stages on rank `destination`; 0 for other work."""
        if result.role is Role.STUDENT or result.op is not Op.FORWARD or not costs.feature_bytes:
            return 0
        sizes = (costs.feature_bytes[number] for number in self.features_to(result.stage, destination))
        return sum(sizes) * self.unit_scale(result, costs)

    def unit_scale(self, work: Action, costs: StageCosts) -> float:
        """The factor on the costs' seconds and bytes for a forward or backward of this unit.

        The costs are those of a microbatch of full size in a view that costs 1.
        """
        assert work.microbatch is not None
        return costs.views[work.microbatch % self.views_of(work.role)] / self.pieces

    def lines(self) -> list[str]:
        """The lines of a schedule's text that `from_lines` reads back."""
        return [f"{line}: {_FORMS[kind][0](getattr(self, name))}" for name, line, kind in self._lines() if self._said(name)]

    def _said(self, name: str) -> bool:
        """Whether the text has a line for a field: it tells of features and ties only where there are any."""
        return name not in _TOLD_IF_ANY or bool(getattr(self, name))

    @classmethod
    def from_lines(cls, fields: Fields) -> PipelineStructure:
        """Read back `lines`."""
        lines = [(name, line, kind) for name, line, kind in cls._lines() if name not in _TOLD_IF_ANY or line in fields]
        return cls(**{name: _FORMS[kind][1](line, fields) for name, line, kind in lines})

    @classmethod
    def _lines(cls) -> list[tuple[str, str, Any]]:
        """(field, name of its line, its type) in the order of the lines."""
        types = get_type_hints(cls)
        found = [(f.name, f.name.removeprefix("num_").replace("_", " "), types[f.name]) for f in fields_of(cls)]
        return sorted(found, key=lambda line: list(_FORMS).index(line[2]))

    def label(self, action: Action) -> str:
        """`F0`, `t1` for a teacher's forward; where some rank has several stages of one model, `S2F0`."""
        several = any(len(set(ranks)) < len(ranks) for ranks in (self.student_ranks, self.teacher_ranks))
        name = "t" if action.role is Role.TEACHER and action.op is Op.FORWARD else action.op.value
        if several:
            name = f"{action.role.value}{action.stage}{action.op.value}"
        return f"{name}{'' if action.microbatch is None else action.microbatch}"


@dataclass(frozen=True, slots=True)
class Demands:
    """What a task asks of any pipeline's schedule; fields as in `PipelineStep`, but that `features` are pairs of blocks."""

    momentum: bool = False
    views: int = 1
    teacher_views: int = 1
    batch_loss: bool = False
    clip: bool = False
    features: tuple[tuple[int, int], ...] = ()
    """(student block, teacher block) of each pair whose outputs are compared inside the models."""
    ties: tuple[tuple[int, ...], ...] = ()
    """The student blocks that have a trained weight in common, for each such weight."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple((student, teacher) for student, teacher in self.features))
        object.__setattr__(self, "ties", tuple(tuple(blocks) for blocks in self.ties))

    def of_stages(self, student_partition: Sequence[int], teacher_partition: Sequence[int]) -> dict[str, Any]:
        """The demands as fields of a `PipelineStructure` whose stages have these numbers of blocks."""
        ends = [list(accumulate(partition)) for partition in (student_partition, teacher_partition)]
        stages = [tuple(bisect_right(of, block) for of, block in zip(ends, pair, strict=True)) for pair in self.features]
        tied = [{bisect_right(ends[0], block) for block in blocks} for blocks in self.ties]
        apart = set[int]().union(*(stages for stages in tied if len(stages) > 1))
        return {**asdict(self), "features": tuple(stages), "ties": tuple(sorted(apart))}


def pipeline(num_stages: int, num_microbatches: int, *, teacher: bool = True, **rest: Any) -> PipelineStructure:
    """The structure with stage i of both models on rank i. `rest`: further fields of the `PipelineStructure`."""
    ranks = tuple(range(num_stages))
    return PipelineStructure(ranks, ranks if teacher else (), num_microbatches, **rest)


_READS_WEIGHTS = (Op.FORWARD, Op.BACKWARD, Op.INPUT, Op.WEIGHT)


def _versions(rows: Sequence[Sequence[Action]], structure: PipelineStructure) -> tuple[tuple[Versions, ...], list[str]]:
    """The versions that each step's forwards read, and where they are not what the structure declares.

    Step k reads student version k, and a teacher version of 0 when it is frozen, of k when it moves; less the declared
    staleness. A backward runs on the version its forward read. A stage keeps as many old versions of the student's
    weights as its declared staleness, and the teacher's newest only.
    """
    student: dict[int, set[int]] = defaultdict(set)
    teacher: dict[int, set[int]] = defaultdict(set)
    problems = []
    for rank, row in enumerate(rows):
        updates = Counter[tuple[Role, int]]()
        named = set[Action]()  # once, not in every step
        for action in row:
            if not action.computes or action.op not in _READS_WEIGHTS:
                if action.op in (Op.UPDATE, Op.EMA):
                    updates[action.role, action.stage] += 1
                trained = updates[Role.STUDENT, action.stage]
                if action.op is Op.EMA and trained != action.step + 1 and action.at(0) not in named:
                    named.add(action.at(0))
                    problems.append(f"rank {rank}: {action} follows student version {trained}, not {action.step + 1}")
                continue
            newest = updates[action.role, action.stage]
            if action.role is Role.TEACHER:
                expected = max(0, action.step - structure.staleness) if structure.momentum else 0
                used, versions = newest, teacher
            elif structure.train:
                expected = max(0, action.step - structure.student_staleness)
                used, versions = sorted((newest - structure.student_staleness, expected, newest))[1], student
            else:
                continue
            versions[action.step].add(used)
            if used != expected and action.at(0) not in named:
                named.add(action.at(0))
                who = action.role.name.lower()
                problems.append(f"rank {rank}: {action} reads {who} version {used}, expected version {expected}")
    steps = sorted(student)
    return tuple(Versions(k, tuple(sorted(student[k])), tuple(sorted(teacher[k]))) for k in steps), problems


def _bounds(
    rows: Sequence[Sequence[Action]], structure: PipelineStructure, stash: Sequence[int], run_ahead: int
) -> tuple[tuple[int, ...], int, list[str]]:
    """Stash peak of every rank and the largest run-ahead, and where they pass the declared bounds."""
    peaks, most_ahead, problems = [], 0, []
    for rank, row in enumerate(rows):
        held = peak = 0
        student, teacher = structure.stages_of(rank, Role.STUDENT), structure.stages_of(rank, Role.TEACHER)
        ahead = 0
        for action in row:
            if not action.computes:
                continue
            if action.op is Op.FORWARD and action.role is Role.STUDENT and structure.train:
                held += 1
            elif action.op is structure.backward_ops[-1]:
                held -= 1
            if action.op is Op.FORWARD and student and teacher:
                taught = len(student) * structure.views
                ahead += taught if action.role is Role.TEACHER else -len(teacher) * structure.teacher_views
                most_ahead = max(most_ahead, -(-ahead // (taught * len(teacher))))
            if held > peak:
                peak = held
                if held > stash[rank]:
                    problems.append(f"rank {rank}: {action} makes {held} stashed microbatches, the bound is {stash[rank]}")
            if most_ahead > run_ahead and action.role is Role.TEACHER:
                problems.append(f"rank {rank}: {action} runs {most_ahead} microbatches ahead, the bound is {run_ahead}")
                break
        peaks.append(peak)
    return tuple(peaks), most_ahead, problems
