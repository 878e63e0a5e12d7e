"""The kinds of training, as values: which models take part and what the loss is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from pipestill.arguments import a_loss, one_of, raise_problems, real_number, whole
from pipestill.errors import DataError, ModelError
from pipestill.losses import DistillationLoss, LossValue, MomentumLoss, SupervisedLoss
from pipestill.model.block import Block
from pipestill.model.blocks import BlockModel
from pipestill.schedule.pipeline.structure import Demands


@dataclass(frozen=True)
class Distillation:
    """A frozen teacher and a student trained end to end.

    `loss(student_output, teacher_output, target)` is the mean over the rows it gets, a scalar or a dict of scalars
    that add up to it. The teacher runs in eval mode, without gradients, and is never changed. Cuts: see `BlockModel`.
    """

    teacher: nn.Module
    student: nn.Module
    loss: DistillationLoss
    teacher_cuts: Sequence[str | Block] | None = None
    student_cuts: Sequence[str | Block] | None = None

    def __post_init__(self) -> None:
        check_parts({"teacher": self.teacher, "student": self.student}, {"the loss": self.loss})
        _check_apart(self.teacher, self.student)

    @cached_property
    def student_blocks(self) -> BlockModel:
        return BlockModel(self.student, self.student_cuts)

    @cached_property
    def teacher_blocks(self) -> BlockModel | None:
        return BlockModel(self.teacher, self.teacher_cuts)

    @property
    def demands(self) -> Demands:
        return Demands()

    def loss_parts(self, student: Sequence[Any], teacher: Sequence[Any], target: Any) -> dict[str, Tensor]:
        """The loss of the only view's outputs, as named parts that add up to it."""
        return _parts(self.loss(student[0], teacher[0], target))


@dataclass(frozen=True)
class Momentum:
    """A student and a teacher that follows it: after each update, teacher = m * teacher + (1 - m) * student.

    A batch's inputs are a tuple of `views` nests, of any sizes; the teacher sees the first `teacher_views` of them (default:
    all). `loss(student_outputs, teacher_outputs, target)` takes one output a view and returns the mean over their rows, a
    scalar or a dict of scalars that add up to it; no gradient goes into the teacher's. With `batch_loss` the outputs
    are of the whole batch, so that losses may compare samples with each other (InfoNCE); they are nests of tensors whose
    first axis counts rows, then. Otherwise they are of one microbatch.

    `momentum` is m in [0, 1), or a function from the step (from 0) to it. Every parameter of the teacher has the name and
    shape of one of the student, which may have further blocks at its end (a predictor); the teacher starts as it
    is given, usually as a deep copy. `teacher_mode`: what its dropout and batch norm do. `teacher_buffers`: buffers are the
    teacher's "own", which its forwards change, or a "copy" of the student's after each update. (TSPipe, section 2; BYOL,
    Grill et al. 2020; MoCo v3, Chen et al. 2021.)
    """

    teacher: nn.Module
    student: nn.Module
    loss: MomentumLoss
    momentum: float | Callable[[int], float] = 0.996
    views: int = 2
    teacher_views: int | None = None
    batch_loss: bool = False
    teacher_mode: Literal["train", "eval"] = "train"
    teacher_buffers: Literal["own", "copy"] = "own"
    teacher_cuts: Sequence[str | Block] | None = None
    student_cuts: Sequence[str | Block] | None = None

    def __post_init__(self) -> None:
        seen = self.teacher_views
        check_parts(
            {"teacher": self.teacher, "student": self.student},
            {"the loss": self.loss},
            (
                *whole("views", self.views),
                *(() if seen is None else whole("teacher_views", seen)),
                *one_of("batch_loss", self.batch_loss, bool, "True or False"),
                *(
                    ()
                    if callable(self.momentum)
                    else one_of("momentum", self.momentum, (int, float), "a number or a function")
                ),
            ),
        )
        _check_apart(self.teacher, self.student)
        if self.views < 1 or not 1 <= self.demands.teacher_views <= self.views:
            raise ModelError(f"the teacher sees {self.demands.teacher_views} of {self.views} views; expected 1 to all")
        if not callable(self.momentum) and not 0.0 <= self.momentum < 1.0:
            raise ModelError(f"momentum is {self.momentum}; expected 0 or more and less than 1")
        for name, value, known in (
            ("teacher_mode", self.teacher_mode, ("train", "eval")), ("teacher_buffers", self.teacher_buffers, ("own", "copy"))
        ):  # fmt: skip
            if value not in known:
                raise ModelError(f"{name} is '{value}'; expected {' or '.join(known)}")
        student, teacher = self.student_blocks, self.teacher_blocks
        if len(teacher) > len(student):
            raise ModelError(f"the teacher has {len(teacher)} blocks, more than the student's {len(student)}")
        for i in range(len(teacher)):
            block = range(i, i + 1)
            mine = {name: p.shape for name, p in student.parameters_of(block).items()}
            for name, parameter in teacher.parameters_of(block).items():
                if mine.get(name) != parameter.shape:
                    raise ModelError(
                        f"teacher block {i} ('{teacher.blocks[i].name}') has a parameter '{name}' "
                        f"{tuple(parameter.shape)}, which student block {i} ('{student.blocks[i].name}') lacks; a momentum "
                        "teacher is a copy of the student's first blocks"
                    )

    @cached_property
    def student_blocks(self) -> BlockModel:
        return BlockModel(self.student, self.student_cuts)

    @cached_property
    def teacher_blocks(self) -> BlockModel:
        return BlockModel(self.teacher, self.teacher_cuts)

    @property
    def demands(self) -> Demands:
        seen = self.views if self.teacher_views is None else self.teacher_views
        return Demands(momentum=True, views=self.views, teacher_views=seen, batch_loss=self.batch_loss)

    def momentum_at(self, step: int) -> float:
        """M for the move after the update of `step`; `ConfigError` for one that cannot be."""
        value = self.momentum(step) if callable(self.momentum) else self.momentum
        raise_problems(real_number(f"momentum({step})", value, least=0, most=1))
        return value

    def loss_parts(self, student: Sequence[Any], teacher: Sequence[Any], target: Any) -> dict[str, Tensor]:
        """The loss as named parts that add up to it."""
        return _parts(self.loss(student, teacher, target))


@dataclass(frozen=True)
class Supervised:
    """A student alone, trained on labels: the baseline that distillation is compared with.

    `loss(output, target)` is the mean over the rows it gets, a scalar or a dict of scalars that add up to it.
    """

    student: nn.Module
    loss: SupervisedLoss
    student_cuts: Sequence[str | Block] | None = None

    def __post_init__(self) -> None:
        check_parts({"student": self.student}, {"the loss": self.loss})

    @cached_property
    def student_blocks(self) -> BlockModel:
        return BlockModel(self.student, self.student_cuts)

    @property
    def teacher_blocks(self) -> BlockModel | None:
        return None

    @property
    def demands(self) -> Demands:
        return Demands()

    def loss_parts(self, student: Sequence[Any], teacher: Sequence[Any], target: Any) -> dict[str, Tensor]:
        """The loss as named parts that add up to it; `teacher` is empty."""
        return _parts(self.loss(student[0], target))


Task = Distillation | Momentum | Supervised


def view(task: Task, inputs: Any, index: int) -> Any:
    """One view of a batch's inputs."""
    return inputs[index] if isinstance(task, Momentum) else inputs


def check_views(task: Task, inputs: Any) -> None:
    """`DataError` when a batch does not hold the views that the task declares."""
    if isinstance(task, Momentum) and (not isinstance(inputs, (tuple, list)) or len(inputs) != task.views):
        came = f"{len(inputs)} of them" if isinstance(inputs, (tuple, list)) else type(inputs).__name__
        raise DataError(
            f"the task has {task.views} views of each sample, so a batch's inputs are a tuple of {task.views}, got {came}; "
            "let the loader yield ((view, view, ...), targets)"
        )


def teacher_trains(task: Task) -> bool:
    """Whether the teacher runs in train mode."""
    return isinstance(task, Momentum) and task.teacher_mode == "train"


def check_parts(models: Mapping[str, object], losses: Mapping[str, object], more: Iterable[str] = ()) -> None:
    """`ModelError` for what is no model or no loss, and what `more` has found. A loss may hold buffers, but nothing to train:
    no optimizer would see it.
    """
    problems = [
        *(p for name, model in models.items() for p in one_of(name, model, nn.Module, "an nn.Module")),
        *(p for name, loss in losses.items() for p in a_loss(name, loss)),
        *more,
    ]
    raise_problems(problems, ModelError)
    for loss in losses.values():
        _check_untrained(loss)


def _check_untrained(loss: object) -> None:
    trained = [n for n, p in loss.named_parameters() if p.requires_grad] if isinstance(loss, nn.Module) else []
    if trained:
        raise ModelError(
            f"the loss has parameters to train ({', '.join(trained[:5])}{' and more' if len(trained) > 5 else ''}), "
            "but only the student is trained; make them part of the student, or freeze them (requires_grad_(False))"
        )


def _check_apart(teacher: nn.Module, student: nn.Module) -> None:
    if teacher is student:
        raise ModelError("teacher and student are the same module; expected two")
    shared = set(_parts_of(teacher)) & set(_parts_of(student))
    if shared:
        names = [name for part, name in _parts_of(student).items() if part in shared]
        raise ModelError(
            f"teacher and student share {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}; "
            "a teacher needs modules, parameters and buffers of its own (copy.deepcopy)"
        )


def _parts_of(model: nn.Module) -> dict[int, str]:
    """The identity and name of everything that a model consists of."""
    named = (*model.named_modules(), *model.named_parameters(), *model.named_buffers())
    return {id(part): f"'{name}'" for name, part in named}


_LOGGED = ("step", "epoch", "loss", "lr", "grad_norm", "seconds", "samples_per_second", "bubble", "momentum")


def _parts(value: LossValue) -> dict[str, Tensor]:
    parts = dict(value) if isinstance(value, Mapping) else {"loss": value}
    logged = [name for name in parts if not isinstance(name, str) or (len(parts) > 1 and name in _LOGGED)]
    if logged:
        raise ModelError(
            f"parts of the loss are named {', '.join(map(repr, logged))}; expected other names, as text: the log has "
            f"{', '.join(_LOGGED)} of its own"
        )
    if not parts:
        raise ModelError("the loss gave no part; expected a scalar, or a dict of scalars that add up")
    for name, part in parts.items():
        if not isinstance(part, Tensor) or part.dim() or part.is_complex():
            kind = "complex tensor" if isinstance(part, Tensor) and part.is_complex() else "tensor"
            shape = f"a {kind} of shape {tuple(part.shape)}" if isinstance(part, Tensor) else repr(part)
            raise ModelError(f"the loss gave {shape} as '{name}'; expected a scalar, or a dict of scalars that add up")
    return parts
