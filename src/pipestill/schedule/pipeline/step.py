"""What one step of a pipeline computes, in the order of a plain loop."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipestill.schedule.action import Action, Op, Role


@dataclass(frozen=True, slots=True)
class PipelineStep:
    """The work of one step on stages of a student and of its teacher; see `PipelineStructure`, which adds what waits for what.

    `student_ranks[i]` is the rank of student stage i, `teacher_ranks[i]` that of teacher stage i (empty: no
    teacher). `train=False` is forward only, for validation. `serial` adds the needs that make plain
    inter-layer model parallelism: every pass through a model starts after the one before it in a plain loop has ended.

    A sample may have several `views`, of which the teacher sees the first `teacher_views`. Every pass of one microbatch
    in one view is a *unit*, counted microbatch by microbatch: unit u of the student is view u % views of microbatch
    u // views. The loss takes all views of a microbatch together, or with `batch_loss` those of the whole batch.

    `momentum`: after a stage's update, its teacher's weights move towards it, on the same rank (so student and teacher
    have the same stages). The teacher's forwards of step k then read the version after k - `staleness` such moves,
    and with `student_staleness` the student's read that after k - 1 updates. `split`: backwards are two halves.
    `clip`: updates wait for the gradients of all stages, whose norm they share. `pieces`: how many of this structure's
    microbatches make one of those that costs were measured for.

    `features`: (student stage, teacher stage) of each pair of blocks whose outputs are compared inside the models. A student
    stage with such a pair has a loss of its own, which takes values from inside both stages; their forwards give them.

    `ties`: the student stages that have trained weights in common. Each gives the others its gradients of these once a step.
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
    features: tuple[tuple[int, int], ...] = ()
    ties: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.student_ranks or self.num_microbatches < 1:
            raise ValueError("a structure has at least one student stage and one microbatch")
        used = set(self.student_ranks) | set(self.teacher_ranks)
        if used != set(range(len(used))):
            raise ValueError(f"ranks {sorted(used)} are not 0 to {len(used) - 1}")
        if self.pieces < 1 or self.num_microbatches % self.pieces:
            raise ValueError(f"{self.num_microbatches} microbatches are no multiple of {self.pieces} pieces")
        if not 1 <= self.teacher_views <= self.views:
            raise ValueError(f"a teacher that sees {self.teacher_views} of {self.views} views; expected 1 to all")
        if self.momentum and self.teacher_ranks != self.student_ranks:
            raise ValueError("a momentum teacher's stages sit where the student's do")
        if min(self.staleness, self.student_staleness) < 0 or max(self.staleness, self.student_staleness) > 1:
            raise ValueError(f"staleness {self.staleness} and {self.student_staleness}; expected 0 or 1")
        if (self.staleness or self.student_staleness) and not self.momentum:
            raise ValueError("only a momentum teacher's weights, and then the student's, can be stale")
        for student, teacher in self.features:
            if student > self.last or (self.teacher_ranks and teacher >= len(self.teacher_ranks)):
                raise ValueError(f"a feature of student stage {student} and teacher stage {teacher}, which are not both there")

    @property
    def num_ranks(self) -> int:
        """The number of ranks that hold stages."""
        return 1 + max(self.student_ranks + self.teacher_ranks)

    @property
    def last(self) -> int:
        """The student's last stage, which holds the loss of the models' outputs."""
        return len(self.student_ranks) - 1

    @property
    def loss_stages(self) -> tuple[int, ...]:
        """The student's stages that have a loss: the last one, and those with features."""
        return tuple(sorted({self.last, *(student for student, _ in self.features)}))

    def ranks(self, role: Role) -> tuple[int, ...]:
        """The rank of each stage of a role."""
        return self.student_ranks if role is Role.STUDENT else self.teacher_ranks

    def rank_of(self, action: Action) -> int:
        """The rank that computes the payload of `action`."""
        return self.ranks(action.role)[action.stage]

    def stages_of(self, rank: int, role: Role) -> list[int]:
        """The stages of `role` that `rank` holds."""
        return [stage for stage, owner in enumerate(self.ranks(role)) if owner == rank]

    def views_of(self, role: Role) -> int:
        """Count the views of a sample that a model sees."""
        return self.views if role is Role.STUDENT else self.teacher_views

    def num_units(self, role: Role) -> int:
        """Count the passes through a model of one step."""
        return self.num_microbatches * self.views_of(role)

    @property
    def num_losses(self) -> int:
        """The number of times that the loss is evaluated in one step."""
        return 1 if self.batch_loss else self.num_microbatches

    def units_of_loss(self, loss: int, role: Role) -> range:
        """The units whose outputs the loss of this number takes."""
        units = self.num_units(role) // self.num_losses
        return range(loss * units, (loss + 1) * units)

    def taught_by(self, stage: int) -> list[int]:
        """The teacher's stages whose forwards the loss of a student's stage takes something of."""
        taught = {teacher for student, teacher in self.features if student == stage}
        last = {len(self.teacher_ranks) - 1} if stage == self.last else set()
        return sorted(taught | last) if self.teacher_ranks else []

    def passes_output(self, stage: int, destination: int) -> bool:
        """Whether rank `destination` takes the whole output of a teacher's stage: as the next stage does, or the last loss."""
        passed_on = stage < len(self.teacher_ranks) - 1
        return destination == (self.teacher_ranks[stage + 1] if passed_on else self.student_ranks[self.last])

    def features_to(self, stage: int, destination: int) -> list[int]:
        """The numbers of the features for which a teacher's stage gives rank `destination` something."""
        pairs = enumerate(self.features)
        return [n for n, (student, teacher) in pairs if teacher == stage and self.student_ranks[student] == destination]

    def loss_of_unit(self, unit: int) -> int:
        """The number of the loss that takes a student's unit."""
        return unit // (self.num_units(Role.STUDENT) // self.num_losses)

    @property
    def backward_ops(self) -> tuple[Op, ...]:
        """The work that a backward consists of, in its order."""
        return (Op.INPUT, Op.WEIGHT) if self.split else (Op.BACKWARD,)

    def passes(self) -> Iterator[tuple[Role, Op, int]]:
        """Every pass of a step in the order of a plain loop: (whose, forward, losses or backward, unit)."""
        per_loss = self.num_microbatches // self.num_losses
        for loss in range(self.num_losses):
            for microbatch in range(loss * per_loss, (loss + 1) * per_loss):
                for role in (Role.TEACHER, Role.STUDENT):
                    if self.ranks(role):
                        first = microbatch * self.views_of(role)
                        yield from ((role, Op.FORWARD, first + view) for view in range(self.views_of(role)))
            yield Role.STUDENT, Op.LOSS, loss
            if self.train:
                yield from ((Role.STUDENT, self.backward_ops[0], u) for u in self.units_of_loss(loss, Role.STUDENT))

    def actions(self, step: int = 0) -> Iterator[Action]:
        """Every piece of work of one step, in the order of a plain loop."""
        yield Action(Role.STUDENT, 0, Op.DATA, None, step)
        stages = range(len(self.student_ranks))
        for role, op, unit in self.passes():
            if op is Op.LOSS:
                yield from (Action(role, stage, op, unit, step) for stage in self.loss_stages)
            elif op is Op.FORWARD:
                yield from (Action(role, stage, op, unit, step) for stage in range(len(self.ranks(role))))
            else:
                for stage in reversed(stages):
                    yield from (Action(role, stage, half, unit, step) for half in self.backward_ops)
        if self.train:
            yield from (Action(Role.STUDENT, stage, Op.GATHER, None, step) for stage in self.ties)
            if self.clip:
                yield from (Action(Role.STUDENT, stage, Op.NORM, None, step) for stage in stages)
            for stage in stages:
                yield Action(Role.STUDENT, stage, Op.UPDATE, None, step)
                if self.momentum:
                    yield Action(Role.TEACHER, stage, Op.EMA, None, step)
