"""What the tasks of models that are trained end to end have in common: blocks, losses, and what is refused in them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from pipestill.arguments import a_loss, one_of, raise_problems
from pipestill.errors import ModelError
from pipestill.losses import LossValue
from pipestill.losses.counted import counts_of
from pipestill.model.block import Block
from pipestill.model.blocks import BlockModel
from pipestill.model.features import Beside, FeatureLosses


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


class TaskLosses(CutStudent):
    """What a task's losses count, and which of their modules are trained."""

    loss: Callable[..., LossValue]

    @property
    def feature_losses(self) -> FeatureLosses:
        """The losses between values inside the two models: none."""
        return FeatureLosses()

    @property
    def beside(self) -> tuple[Beside, ...]:
        """Losses that are modules, and projectors: what is trained beside the student, where it has parameters."""
        own = (Beside("loss", self.loss, len(self.student_blocks) - 1),) if isinstance(self.loss, nn.Module) else ()
        return (*own, *self.feature_losses.beside)

    def loss_counts(self, target: Any) -> dict[str, float]:
        """Count how much of a batch some targets are, by part of the loss; parts without a count are means over rows.

        Args:
            target: the targets of some rows, on the CPU.

        Raises:
            ModelError: the loss's `counts` fails, or gives no numbers.
        """
        return counts_of(self.loss, target)


def check_parts(
    models: Mapping[str, object], losses: Mapping[str, object], more: Iterable[str] = (), *, trained: bool = False
) -> None:
    """Raise `ModelError` with everything wrong among `models` and `losses`, by name, and with the problems in `more`.

    A loss may hold buffers, but unless it is `trained` no parameter to train: no optimizer would see it.
    """
    problems = [
        *(p for name, model in models.items() for p in one_of(name, model, nn.Module, "an nn.Module")),
        *(p for name, loss in losses.items() for p in a_loss(name, loss)),
        *more,
    ]
    raise_problems(problems, ModelError)
    for loss in () if trained else losses.values():
        unseen = [n for n, p in loss.named_parameters() if p.requires_grad] if isinstance(loss, nn.Module) else []
        if unseen:
            raise ModelError(
                f"the loss has parameters to train ({', '.join(unseen[:5])}{' and more' if len(unseen) > 5 else ''}), "
                "but only the student is trained; make them part of the student, or freeze them (requires_grad_(False))"
            )


def check_apart(teacher: nn.Module, student: nn.Module) -> None:
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


def check_beside(task: TaskLosses, teachers: Iterable[object]) -> None:
    """Refuse losses and projectors that share tensors with a model or among each other, or names with the student."""
    owners = dict.fromkeys(_tensors(task.student), "the student")
    for teacher in teachers:
        owners |= dict.fromkeys(_tensors(teacher), "a teacher")
    inner = [(name, module) for name, module, _ in task.feature_losses.beside]
    beside = [*inner, *([("loss", task.loss)] if isinstance(task.loss, nn.Module) else [])]
    for name, module in beside:
        for key, tensor in _tensors(module).items():
            if owners.setdefault(key, name) != name:
                raise ModelError(f"{name} has {tensor} in common with {owners[key]}; give each its own (copy.deepcopy)")
    taken = [name for name, _ in task.student.named_parameters() for prefix, _ in inner if name.startswith(f"{prefix}.")]
    if taken:
        raise ModelError(f"the student has parameters {', '.join(taken[:5])}, named as those of losses; give the features a name")
    clashing = [pair.name for pair in task.feature_losses.pairs if pair.name in _LOG_COLUMNS]
    if clashing:
        raise ModelError(f"features are named {', '.join(clashing)}, which the log itself uses; give them other names")


def _tensors(module: object) -> dict[int, str]:
    """The parameters and buffers of a module: the id of each, and its name."""
    assert isinstance(module, nn.Module)
    return {id(tensor): f"'{name}'" for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def _contents(model: nn.Module) -> dict[int, str]:
    """The modules, parameters and buffers of a model: the id of each, and its name."""
    named = (*model.named_modules(), *model.named_parameters(), *model.named_buffers())
    return {id(part): f"'{name}'" for name, part in named}


_LOG_COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm", "seconds", "samples_per_second", "bubble", "momentum")
"""Names that the log uses itself, which no part of a loss may have."""


def named_parts(value: LossValue) -> dict[str, Tensor]:
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
