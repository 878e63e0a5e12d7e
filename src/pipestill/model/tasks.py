"""The tasks of models that are trained end to end: which models take part, what the loss is, how the teacher changes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from pipestill.arguments import a_loss, hinted, one_of, raise_problems, real_number, whole
from pipestill.errors import DataError, ModelError
from pipestill.losses import DistillationLoss, LossValue, MomentumLoss, SupervisedLoss
from pipestill.losses.counted import counts_of, with_sums
from pipestill.model.block import Block
from pipestill.model.blocks import BlockModel
from pipestill.model.heads import FusedHead, check_takes_linear_logits
from pipestill.schedule.pipeline.structure import Demands


class CutStudent:
    """Cuts a task's student into blocks."""

    student: nn.Module
    student_cuts: Sequence[str | Block] | None

    @cached_property
    def student_blocks(self) -> BlockModel:
        """The student with its blocks."""
        return BlockModel(self.student, self.student_cuts)


class CutModels(CutStudent):
    """Cuts a task's student and its teacher into blocks."""

    teacher: nn.Module
    teacher_cuts: Sequence[str | Block] | None

    @cached_property
    def teacher_blocks(self) -> BlockModel:
        """The teacher with its blocks."""
        return BlockModel(self.teacher, self.teacher_cuts)


class CountedLoss:
    """Counts what a task's loss is the mean over."""

    loss: Callable[..., LossValue]

    def loss_counts(self, target: Any) -> dict[str, float]:
        """Count how much of a batch some targets are, by part of the loss; parts without a count are means over rows.

        Args:
            target: the targets of some rows, on the CPU.

        Raises:
            ModelError: the loss's `counts` fails, or gives no numbers.
        """
        return counts_of(self.loss, target)


@hinted
@dataclass(frozen=True)
class Distillation(CutModels, CountedLoss):
    """A frozen teacher and a student that is trained end to end (Hinton et al. 2015).

    The teacher runs in eval mode, without gradients, and is never changed.

    Args:
        teacher: the model whose outputs the student is trained on.
        student: the model that is trained.
        loss: `loss(student_output, teacher_output, target)` -> the mean over the rows of the outputs, as a scalar or as a
            dict of named scalars whose sum is the loss. It gets one microbatch at a time; `target` is None where the loader
            gives none. Those that ship: `ps.losses.SoftTarget` and others of `ps.losses`; `ps.losses.counted` makes one that is
            the mean over something else than rows.
        batch_loss: True gives the loss the outputs of the whole batch at once, so that it may compare samples with each
            other (relations between samples, as in RKD); outputs are then nests of tensors whose first axis counts rows. False
            gives it one microbatch at a time.
        teacher_cuts: the teacher's blocks, as `BlockModel` takes them (default: found by `BlockModel`).
        student_cuts: the student's blocks, likewise.
        fuse_heads: True has the loss apply both models' heads to a chunk of tokens at a time, so that logits of all words are
            never held, and hidden states travel to the loss in their place. Both models end with one linear layer, and the
            loss is one of logits (`ps.losses.LogitLoss`). Metrics of a validation get logits as ever.

    Raises:
        ModelError: a model is none, the two share a parameter or buffer, the loss is no function or has parameters, or heads
            cannot be fused.
    """

    teacher: nn.Module
    student: nn.Module
    loss: DistillationLoss
    batch_loss: bool = field(default=False, kw_only=True)
    teacher_cuts: Sequence[str | Block] | None = None
    student_cuts: Sequence[str | Block] | None = None
    fuse_heads: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        wrong = [p for name in ("batch_loss", "fuse_heads") for p in one_of(name, getattr(self, name), bool, "True or False")]
        check_parts({"teacher": self.teacher, "student": self.student}, {"the loss": self.loss}, wrong)
        _check_apart(self.teacher, self.student)
        if self.fuse_heads:
            check_takes_linear_logits(self.loss)
            _ = self.heads

    @cached_property
    def heads(self) -> tuple[FusedHead, ...]:
        """The heads of the student and of the teacher that the loss applies; none unless they are fused."""
        both = (("student", self.student_blocks), ("teacher", self.teacher_blocks))
        return tuple(FusedHead(role, blocks) for role, blocks in both) if self.fuse_heads else ()

    @property
    def demands(self) -> Demands:
        """What the task asks of a schedule."""
        return Demands(batch_loss=self.batch_loss)

    def loss_parts(self, student: Sequence[Any], teacher: Sequence[Any], target: Any) -> dict[str, Tensor]:
        """Compute the loss as named parts whose sum it is; those that `loss_counts` names are sums, the others means over rows.

        Args:
            student: a list of the student's output.
            teacher: a list of the teacher's output.
            target: the targets of the same rows.
        """
        outputs = [student[0], teacher[0]]
        if self.heads:
            outputs = [head.with_logits(output) for head, output in zip(self.heads, outputs, strict=True)]
        return _named_parts(with_sums(self.loss, *outputs, target))


@hinted
@dataclass(frozen=True)
class Momentum(CutModels, CountedLoss):
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
        check_parts(models, {"the loss": self.loss}, self._value_problems())
        _check_apart(self.teacher, self.student)
        self._check_copy()

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
        return _named_parts(with_sums(self.loss, student, teacher, target))


@hinted
@dataclass(frozen=True)
class Supervised(CutStudent, CountedLoss):
    """A student that is trained alone on labels: the baseline that distillation is compared with.

    Args:
        student: the model that is trained.
        loss: `loss(output, target)` -> the mean over the rows of the output, as a scalar or as a dict of named scalars whose
            sum is the loss. It gets one microbatch at a time.
        batch_loss: True gives the loss the output of the whole batch at once, as for `ps.Distillation`.
        student_cuts: the model's blocks, as `BlockModel` takes them (default: found by `BlockModel`).

    Raises:
        ModelError: the student is no model, or the loss is no function or has parameters.
    """

    student: nn.Module
    loss: SupervisedLoss
    batch_loss: bool = field(default=False, kw_only=True)
    student_cuts: Sequence[str | Block] | None = None

    def __post_init__(self) -> None:
        wrong = one_of("batch_loss", self.batch_loss, bool, "True or False")
        check_parts({"student": self.student}, {"the loss": self.loss}, wrong)

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
        return _named_parts(with_sums(self.loss, student[0], target))


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


def check_parts(models: Mapping[str, object], losses: Mapping[str, object], more: Iterable[str] = ()) -> None:
    """Raise `ModelError` with everything wrong among `models` and `losses`, by name, and with the problems in `more`.

    A loss may hold buffers, but no parameter to train: no optimizer would see it.
    """
    problems = [
        *(p for name, model in models.items() for p in one_of(name, model, nn.Module, "an nn.Module")),
        *(p for name, loss in losses.items() for p in a_loss(name, loss)),
        *more,
    ]
    raise_problems(problems, ModelError)
    for loss in losses.values():
        trained = [n for n, p in loss.named_parameters() if p.requires_grad] if isinstance(loss, nn.Module) else []
        if trained:
            raise ModelError(
                f"the loss has parameters to train ({', '.join(trained[:5])}{' and more' if len(trained) > 5 else ''}), "
                "but only the student is trained; make them part of the student, or freeze them (requires_grad_(False))"
            )


def _check_apart(teacher: nn.Module, student: nn.Module) -> None:
    """Refuse a teacher that shares a module, a parameter or a buffer with the student."""
    if teacher is student:
        raise ModelError("teacher and student are the same module; expected two")
    shared = set(_contents(teacher)) & set(_contents(student))
    if shared:
        names = [name for part, name in _contents(student).items() if part in shared]
        raise ModelError(
            f"teacher and student share {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}; "
            "a teacher needs modules, parameters and buffers of its own (copy.deepcopy)"
        )


def _contents(model: nn.Module) -> dict[int, str]:
    """The modules, parameters and buffers of a model: the id of each, and its name."""
    named = (*model.named_modules(), *model.named_parameters(), *model.named_buffers())
    return {id(part): f"'{name}'" for name, part in named}


_LOG_COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm", "seconds", "samples_per_second", "bubble", "momentum")
"""Names that the log uses itself, which no part of a loss may have."""


def _named_parts(value: LossValue) -> dict[str, Tensor]:
    """The parts of a loss by name; `ModelError` for a value that is no scalar and no dict of scalars."""
    parts = dict(value) if isinstance(value, Mapping) else {"loss": value}
    taken = [name for name in parts if not isinstance(name, str) or (len(parts) > 1 and name in _LOG_COLUMNS)]
    if taken:
        raise ModelError(
            f"parts of the loss are named {', '.join(map(repr, taken))}; expected other names, as text: the log itself uses "
            f"{', '.join(_LOG_COLUMNS)}"
        )
    if not parts:
        raise ModelError("the loss gave no part; expected a scalar, or a dict of scalars that add up")
    for name, part in parts.items():
        if not isinstance(part, Tensor) or part.dim() or part.is_complex():
            kind = "complex tensor" if isinstance(part, Tensor) and part.is_complex() else "tensor"
            shape = f"a {kind} of shape {tuple(part.shape)}" if isinstance(part, Tensor) else repr(part)
            raise ModelError(f"the loss gave {shape} as '{name}'; expected a scalar, or a dict of scalars that add up")
    return parts
