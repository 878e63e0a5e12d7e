"""The tasks of models that are trained end to end: which models take part, what the loss is, how the teacher changes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from pipestill.arguments import hinted, one_of, raise_problems, real_number, whole
from pipestill.errors import DataError, ModelError
from pipestill.losses import DistillationLoss, MomentumLoss, SupervisedLoss
from pipestill.losses.counted import with_sums
from pipestill.model.block import Block
from pipestill.model.blocks import BlockModel
from pipestill.model.features import FeatureLosses, FeatureTerm, resolve
from pipestill.model.heads import FusedHead, check_takes_linear_logits
from pipestill.model.task_parts import CutModels, TaskLosses, check_apart, check_beside, check_parts, named_parts
from pipestill.model.teachers import teachers_blocks
from pipestill.schedule.pipeline.structure import Demands


@hinted
@dataclass(frozen=True)
class Distillation(TaskLosses):
    """A frozen teacher and a student that is trained end to end (Hinton et al. 2015).

    The teacher runs in eval mode, without gradients, and is never changed.

    Args:
        teacher: the model whose outputs the student is trained on. Or a list of such models: the loss is then the sum of the
            losses with each, by `teacher_weights`, and its parts are named `teacher_0` or `teacher_0.PART` and so on.
        student: the model that is trained.
        loss: `loss(student_output, teacher_output, target)` -> the mean over the rows of the outputs, as a scalar or as a
            dict of named scalars whose sum is the loss. It gets one microbatch at a time; `target` is None where the loader
            gives none. Those that ship: `ps.losses.SoftTarget` and others of `ps.losses`; `ps.losses.counted` makes one that is
            the mean over something else than rows. Where it is a module with parameters, these are trained with the student.
        features: losses between values inside the two models, beside `loss`: what `ps.features(...)` makes, or a dict of these by
            name, or a list. Default: none.
        batch_loss: True gives the loss the outputs of the whole batch at once, so that it may compare samples with each
            other (relations between samples, as in RKD); outputs are then nests of tensors whose first axis counts rows. False
            gives it one microbatch at a time. The losses of `features` likewise.
        teacher_weights: the factor of each teacher's loss, where `teacher` is a list. Default: 1 / the number of teachers.
        teacher_cuts: the teacher's blocks, as `BlockModel` takes them (default: found by `BlockModel`); for a list of teachers,
            a list of these.
        student_cuts: the student's blocks, likewise.
        fuse_heads: True has the loss apply both models' heads to a chunk of tokens at a time, so that logits of all words are
            never held, and hidden states travel to the loss in their place. Both models end with one linear layer, and the
            loss is one of logits (`ps.losses.LogitLoss`). Metrics of a validation get logits as ever.

    Raises:
        ModelError: a model is none, models share a parameter or buffer, the loss is no function, features name a block that
            there is not, or heads cannot be fused.
    """

    teacher: nn.Module | Sequence[nn.Module]
    student: nn.Module
    loss: DistillationLoss
    features: FeatureTerm | Mapping[str, FeatureTerm] | Sequence[FeatureTerm] | None = field(default=None, kw_only=True)
    batch_loss: bool = field(default=False, kw_only=True)
    teacher_weights: Sequence[float] | None = field(default=None, kw_only=True)
    teacher_cuts: Sequence[Any] | None = None
    student_cuts: Sequence[str | Block] | None = None
    fuse_heads: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        given = self.teacher
        several = isinstance(given, (list, tuple))
        teachers = (
            {f"teacher {n}": model for n, model in enumerate(given)} if isinstance(given, (list, tuple)) else {"teacher": given}
        )
        problems = [p for name in ("batch_loss", "fuse_heads") for p in one_of(name, getattr(self, name), bool, "True or False")]
        problems += self._weight_problems(len(teachers), several)
        check_parts({**teachers, "student": self.student}, {"the loss": self.loss}, problems, trained=True)
        for teacher in teachers.values():
            assert isinstance(teacher, nn.Module)
            check_apart(teacher, self.student)
        check_beside(self, teachers.values())
        if self.fuse_heads:
            check_takes_linear_logits(self.loss)
            _ = self.heads

    def _weight_problems(self, teachers: int, several: bool) -> Iterator[str]:
        """Find what is wrong with the weights of several teachers."""
        if several and self.fuse_heads:
            yield "fuse_heads is of one teacher, and there is a list of them; leave it out"
        if several and not teachers:
            yield "teacher is an empty list; expected at least one model"
        if self.teacher_weights is not None:
            if not several:
                yield "teacher_weights is of a list of teachers, and there is one; leave it out"
            elif len(self.teacher_weights) != teachers:
                yield f"there are {teachers} teachers and {len(self.teacher_weights)} teacher_weights; expected one for each"
            for number, weight in enumerate(self.teacher_weights):
                yield from real_number(f"teacher_weights[{number}]", weight, least=0)

    @cached_property
    def teacher_blocks(self) -> BlockModel:
        """The teacher with its blocks; those of several teachers come one after the other, named `0.NAME`, `1.NAME` ..."""
        if isinstance(self.teacher, nn.Module):
            return BlockModel(self.teacher, self.teacher_cuts)
        return teachers_blocks(self.teacher, self.teacher_cuts)

    @cached_property
    def heads(self) -> tuple[FusedHead, ...]:
        """The heads of the student and of the teacher that the loss applies; none unless they are fused."""
        both = (("student", self.student_blocks), ("teacher", self.teacher_blocks))
        return tuple(FusedHead(role, blocks) for role, blocks in both) if self.fuse_heads else ()

    @cached_property
    def feature_losses(self) -> FeatureLosses:
        """The losses between values inside the two models."""
        if self.features is None:
            return FeatureLosses()
        return resolve(self.features, self.student_blocks, self.teacher_blocks)

    @property
    def demands(self) -> Demands:
        """What the task asks of a schedule."""
        return Demands(batch_loss=self.batch_loss, features=self.feature_losses.block_pairs)

    def _part(self, number: int, name: str) -> str:
        """The name in logs of a part of the loss with one teacher."""
        if isinstance(self.teacher, nn.Module):
            return "output" if name == "loss" and self.features is not None else name
        return f"teacher_{number}" if name == "loss" else f"teacher_{number}.{name}"

    def loss_counts(self, target: Any) -> dict[str, float]:
        """Count how much of a batch some targets are, by part of the loss; parts without a count are means over rows.

        Args:
            target: the targets of some rows, on the CPU.
        """
        counts = super().loss_counts(target).items()
        number = 1 if isinstance(self.teacher, nn.Module) else len(self.teacher)
        of_outputs = {self._part(k, name): count for k in range(number) for name, count in counts}
        return {**of_outputs, **self.feature_losses.counts(target)}

    def loss_parts(self, student: Sequence[Any], teacher: Sequence[Any], target: Any) -> dict[str, Tensor]:
        """Compute the loss as named parts whose sum it is; those that `loss_counts` names are sums, the others means over rows.

        Args:
            student: a list of the student's output.
            teacher: a list of the teacher's output.
            target: the targets of the same rows.
        """
        if isinstance(self.teacher, nn.Module):
            outputs = [student[0], teacher[0]]
            if self.heads:
                outputs = [head.with_logits(output) for head, output in zip(self.heads, outputs, strict=True)]
            parts = named_parts(with_sums(self.loss, *outputs, target))
            return {self._part(0, name): part for name, part in parts.items()}
        parts = {}
        weights = self.teacher_weights or (1 / len(self.teacher),) * len(self.teacher)
        for number, (output, weight) in enumerate(zip(teacher[0].outputs, weights, strict=True)):
            named = named_parts(with_sums(self.loss, student[0], output, target))
            parts |= {self._part(number, name): part * weight for name, part in named.items()}
        return parts


@hinted
@dataclass(frozen=True)
class Momentum(CutModels, TaskLosses):
    """A student and a teacher that is an exponential moving average of it: teacher = m * teacher + (1 - m) * student.

    The teacher moves so after each update of the student (BYOL, Grill et al. 2020, section 3.1; MoCo v3, Chen et al. 2021).
    A batch's inputs are a tuple of `views` nests, each of any size; no gradient goes into the teacher.

    Args:
        teacher: the model that follows the student. Every parameter of it has the name and shape of one of the student's
            first blocks; it starts as it is given, usually as `copy.deepcopy` of the student without its predictor.
        student: the model that is trained. It may have further blocks at its end, such as a predictor.
        loss: `loss(student_outputs, teacher_outputs, target)` -> the mean over rows, as a scalar or as a dict of named
            scalars whose sum is the loss. It takes two lists with one output a view.
        momentum: the coefficient m, at least 0 and less than 1, or a function from the step (counted from 0) to it.
        views: how many views of each sample a batch holds.
        teacher_views: how many of them, the first ones, the teacher sees (default: all).
        batch_loss: True gives the loss the outputs of the whole batch at once, so that it may compare samples with each
            other (InfoNCE); outputs are then nests of tensors whose first axis counts rows. False gives it one microbatch
            at a time.
        teacher_mode: "train" or "eval", the mode of the teacher's dropout and batch norm.
        teacher_buffers: "own", buffers that the teacher's forwards change, or "copy", those of the student after each
            update.
        teacher_cuts: the teacher's blocks, as `BlockModel` takes them (default: found by `BlockModel`).
        student_cuts: the student's blocks, likewise.

    Raises:
        ModelError: the teacher is no copy of the student's first blocks, the two share a tensor, or an argument is wrong.
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
        models = {"teacher": self.teacher, "student": self.student}
        check_parts(models, {"the loss": self.loss}, self._value_problems(), trained=True)
        check_apart(self.teacher, self.student)
        self._check_copy()
        check_beside(self, [self.teacher])

    def _value_problems(self) -> Iterator[str]:
        """Find what is wrong with the arguments that are no models and no loss."""
        seen = self.views if self.teacher_views is None else self.teacher_views
        wrong = [*whole("views", self.views, 1), *(() if self.teacher_views is None else whole("teacher_views", seen))]
        yield from wrong
        if not wrong and not 1 <= seen <= self.views:
            yield f"the teacher sees {seen} of {self.views} views; expected 1 to all"
        yield from one_of("batch_loss", self.batch_loss, bool, "True or False")
        if not callable(self.momentum):
            wrong = list(one_of("momentum", self.momentum, (int, float), "a number or a function"))
            yield from wrong
            if not wrong and not 0.0 <= self.momentum < 1.0:
                yield f"momentum is {self.momentum}; expected 0 or more and less than 1"
        if self.teacher_mode not in ("train", "eval"):
            yield f"teacher_mode is '{self.teacher_mode}'; expected train or eval"
        if self.teacher_buffers not in ("own", "copy"):
            yield f"teacher_buffers is '{self.teacher_buffers}'; expected own or copy"

    def _check_copy(self) -> None:
        """Refuse a teacher that is no copy of the student's first blocks."""
        student, teacher = self.student_blocks, self.teacher_blocks
        if len(teacher) > len(student):
            raise ModelError(f"the teacher has {len(teacher)} blocks, more than the student's {len(student)}")
        for i in range(len(teacher)):
            block = range(i, i + 1)
            shapes = {name: p.shape for name, p in student.parameters_of(block).items()}
            for name, parameter in teacher.parameters_of(block).items():
                if shapes.get(name) != parameter.shape:
                    raise ModelError(
                        f"teacher block {i} ('{teacher.blocks[i].name}') has a parameter '{name}' "
                        f"{tuple(parameter.shape)}, which student block {i} ('{student.blocks[i].name}') lacks; a momentum "
                        "teacher is a copy of the student's first blocks"
                    )

    @property
    def demands(self) -> Demands:
        """What the task asks of a schedule."""
        seen = self.views if self.teacher_views is None else self.teacher_views
        return Demands(momentum=True, views=self.views, teacher_views=seen, batch_loss=self.batch_loss)

    def momentum_at(self, step: int) -> float:
        """The coefficient m with which the teacher moves after the update of a step.

        Args:
            step: the step, counted from 0.

        Raises:
            ConfigError: the function of the step gave no number from 0 to 1.
        """
        value = self.momentum(step) if callable(self.momentum) else self.momentum
        raise_problems(real_number(f"momentum({step})", value, least=0, most=1))
        return value

    def loss_parts(self, student: Sequence[Any], teacher: Sequence[Any], target: Any) -> dict[str, Tensor]:
        """Compute the loss as named parts whose sum it is; those that `loss_counts` names are sums, the others means over rows.

        Args:
            student: the student's outputs, one a view.
            teacher: the teacher's outputs, one a view that it sees.
            target: the targets of the same rows.
        """
        return named_parts(with_sums(self.loss, student, teacher, target))


@hinted
@dataclass(frozen=True)
class Supervised(TaskLosses):
    """A student that is trained alone on labels: the baseline that distillation is compared with.

    Args:
        student: the model that is trained.
        loss: `loss(output, target)` -> the mean over the rows of the output, as a scalar or as a dict of named scalars whose
            sum is the loss. It gets one microbatch at a time.
        batch_loss: True gives the loss the output of the whole batch at once, as for `ps.Distillation`.
        student_cuts: the model's blocks, as `BlockModel` takes them (default: found by `BlockModel`).

    Raises:
        ModelError: the student is no model, or the loss is no function.
    """

    student: nn.Module
    loss: SupervisedLoss
    batch_loss: bool = field(default=False, kw_only=True)
    student_cuts: Sequence[str | Block] | None = None

    def __post_init__(self) -> None:
        wrong = one_of("batch_loss", self.batch_loss, bool, "True or False")
        check_parts({"student": self.student}, {"the loss": self.loss}, wrong, trained=True)
        check_beside(self, ())

    @property
    def demands(self) -> Demands:
        """What the task asks of a schedule."""
        return Demands(batch_loss=self.batch_loss)

    @property
    def teacher_blocks(self) -> BlockModel | None:
        """None: there is no teacher."""
        return None

    def loss_parts(self, student: Sequence[Any], teacher: Sequence[Any], target: Any) -> dict[str, Tensor]:
        """Compute the loss as named parts whose sum it is; those that `loss_counts` names are sums, the others means over rows.

        Args:
            student: a list of the student's output.
            teacher: an empty list: there is no teacher.
            target: the targets of the same rows.
        """
        return named_parts(with_sums(self.loss, student[0], target))


Task = Distillation | Momentum | Supervised
"""A task whose models are trained end to end, in a pipeline or in the plain loop."""


def view(task: Task, inputs: Any, index: int) -> Any:
    """Select one view of a batch's inputs; they are the only view of a task without views."""
    return inputs[index] if isinstance(task, Momentum) else inputs


def check_views(task: Task, inputs: Any) -> None:
    """Raise `DataError` when a batch's inputs are not the views that the task declares."""
    if isinstance(task, Momentum) and (not isinstance(inputs, (tuple, list)) or len(inputs) != task.views):
        came = f"{len(inputs)} of them" if isinstance(inputs, (tuple, list)) else type(inputs).__name__
        raise DataError(
            f"the task has {task.views} views of each sample, so a batch's inputs are a tuple of {task.views}, got {came}; "
            "let the loader yield ((view, view, ...), targets)"
        )


def teacher_trains(task: Task) -> bool:
    """Whether the task's teacher runs in train mode."""
    return isinstance(task, Momentum) and task.teacher_mode == "train"
