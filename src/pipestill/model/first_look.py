"""A look at a task before its first step: both models' losses on a few rows, and what is likely to be a mistake."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from pipestill.losses import logits_of
from pipestill.model.blocks import BlockModel
from pipestill.model.nests import copied, distinct_tensors, num_rows, rows_of
from pipestill.model.stepwise import untouched
from pipestill.model.tasks import Distillation, Momentum, Task

_ROWS = 3
"""The rows on which gradients are followed through the student."""
_LEAST_FRACTION = 0.05
"""A gradient at the teacher's own output that is less than this fraction of those elsewhere is rounding."""


@dataclass(frozen=True)
class FirstLook:
    """What a look at some rows showed."""

    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def first_look(task: Task, inputs: Any, targets: Any) -> FirstLook:
    """Evaluate the losses of a task on some rows, without a trace, and find what is likely to be a mistake."""
    if isinstance(task, Momentum):
        return FirstLook()  # its teacher is a copy of the student, and begins as untrained
    rows = num_rows(inputs, "the batch's inputs")
    with untouched(task):
        outputs, taught = _evaluated(task.student_blocks, inputs), None
        if task.teacher_blocks is not None:
            taught = _evaluated(task.teacher_blocks, inputs)
        shown = _shown(_values(task, outputs, taught, targets), task, targets)
        notes = [f"loss before the first step, on {rows} rows: {shown}"]
        warnings: list[str] = []
        student_entropy, teacher_entropy = _cross_entropy(outputs, targets), _cross_entropy(taught, targets)
        if teacher_entropy is not None:
            mine = "" if student_entropy is None else f", the student's {student_entropy[0]:.3g}"
            least = math.log(teacher_entropy[1])
            notes.append(f"cross entropy with the labels: the teacher's {teacher_entropy[0]:.3g}{mine}, guessing {least:.3g}")
            if not teacher_entropy[0] < least:
                warnings.append(
                    f"the teacher's cross entropy with the labels is {teacher_entropy[0]:.3g} on {rows} rows of the first batch, "
                    f"no better than guessing among {teacher_entropy[1]} classes ({least:.3g}): was it trained, on inputs "
                    "prepared like these, and are the labels numbered as its classes are?"
                )
        if isinstance(task, Distillation) and task.teacher_blocks is not None:
            warnings += _not_from_a_file(task.teacher_blocks)
            of_teacher, pure = _distillation_parts(task, outputs, taught, targets)
            if not of_teacher and not task.feature_losses.pairs:
                warnings.append("the loss does not depend on the teacher's output: the student would learn nothing from it")
            if pure and not task.batch_loss:
                warnings += _not_least(task, outputs, taught, targets, pure)
            if of_teacher and not task.feature_losses.pairs:
                few = slice(0, _ROWS)
                warnings += _not_reached(task, rows_of(inputs, few), rows_of(targets, few), of_teacher)
    return FirstLook(tuple(notes), tuple(warnings))


def _evaluated(model: BlockModel, inputs: Any) -> Any:
    """A model's output in eval mode."""
    model.model.eval()
    with torch.no_grad():
        return model(copied(inputs))


def _values(task: Task, student: Any, teacher: Any, targets: Any) -> dict[str, Tensor]:
    """The parts of the loss of given outputs, from the same random numbers each time."""
    torch.manual_seed(0)
    return task.loss_parts([student], [] if task.teacher_blocks is None else [teacher], targets)


def _shown(parts: Mapping[str, Tensor], task: Task, targets: Any) -> str:
    """The parts of a loss as means, in words."""
    counts = task.loss_counts(targets)
    means = {name: float(part) / (counts.get(name, 1.0) or 1.0) for name, part in parts.items()}
    each = f" ({', '.join(f'{name} {value:.3g}' for name, value in means.items())})" if len(means) > 1 else ""
    return f"{sum(means.values()):.4g}{each}"


def _cross_entropy(output: Any, targets: Any) -> tuple[float, int] | None:
    """The cross entropy of logits with labels, and the number of classes; None where it cannot be told what these are."""
    labels = targets.get("labels") if isinstance(targets, Mapping) else targets
    found = logits_of(output) if isinstance(output, Tensor) or (isinstance(output, Mapping) and "logits" in output) else None
    if not isinstance(found, Tensor) or not isinstance(labels, Tensor) or labels.dtype is not torch.int64:
        return None
    classes = found.shape[-1] if found.dim() > 1 else 0
    counted = labels != -100
    if labels.shape != found.shape[:-1] or classes < 2 or not bool(counted.any()):
        return None
    if not 0 <= int(labels[counted].min()) <= int(labels[counted].max()) < classes:
        return None
    return float(F.cross_entropy(found[counted].float(), labels[counted])), classes


def _not_from_a_file(model: BlockModel) -> list[str]:
    """Warn of a teacher from `from_pretrained` of which some parameters were in no file; such files are known by their flag."""
    named = dict(model.model.named_parameters())
    left = [name for name, p in named.items() if not getattr(p, "_is_hf_initialized", False)]
    if not left or len(left) == len(named):
        return []
    more = f" and {len(left) - 5} more" if len(left) > 5 else ""
    return [f"the teacher has parameters that no file gave, which are as they were drawn: {', '.join(left[:5])}{more}"]


# -- which parts of the loss come from the teacher, and whether they do what they should --------------------------------


def _distillation_parts(task: Distillation, student: Any, teacher: Any, targets: Any) -> tuple[list[str], list[str]]:
    """The parts of the loss that change with the teacher's output, and those of them that do not change with the labels."""
    with torch.no_grad():
        known = _values(task, student, teacher, targets)
        other = _values(task, student, _halved(teacher), targets)
        relabelled = pytree.tree_map_only(Tensor, _turned, targets)
        labels = _values(task, student, teacher, relabelled)
    of_teacher = [name for name, part in known.items() if not torch.equal(part, other[name])]
    changed = any(not torch.equal(a, b) for a, b in zip(distinct_tensors(targets), distinct_tensors(relabelled), strict=False))
    told = changed or not distinct_tensors(targets)
    return of_teacher, [name for name in of_teacher if told and torch.equal(known[name], labels[name])]


def _halved(output: Any) -> Any:
    """Another output of the same form."""
    return pytree.tree_map_only(Tensor, lambda t: t * 0.5 if t.is_floating_point() else t, output)


def _turned(labels: Tensor) -> Tensor:
    """Other labels of the same range, where these are whole numbers; what is negative stays, since it does not count."""
    if labels.is_floating_point() or labels.dtype is torch.bool or not bool((labels >= 0).any()):
        return labels
    counted = labels[labels >= 0]
    return torch.where(labels >= 0, counted.max() + counted.min() - labels, labels)


def _not_least(task: Distillation, student: Any, teacher: Any, targets: Any, pure: Sequence[str]) -> list[str]:
    """Warn of parts that pull the student away from the teacher's own output."""
    form = [getattr(leaf, "shape", None) for leaf in pytree.tree_leaves(student)]
    if pytree.tree_structure(student) != pytree.tree_structure(teacher) or form != [
        getattr(leaf, "shape", None) for leaf in pytree.tree_leaves(teacher)
    ]:
        return []

    def taken(output: Any) -> tuple[float, float]:
        """The sum of the parts, and the norm of its gradient."""
        with torch.enable_grad():
            value = pytree.tree_map_only(
                Tensor, lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t, output
            )
            total = torch.stack([_values(task, value, teacher, targets)[name].double() for name in pure]).sum()
            given = [tensor for tensor in distinct_tensors(value) if tensor.requires_grad]
            gradients = torch.autograd.grad(total, given, allow_unused=True) if total.requires_grad else ()
        return float(total.detach()), math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))

    (value, own), (_, mine), (_, elsewhere) = taken(teacher), taken(student), taken(_halved(teacher))
    if not own > _LEAST_FRACTION * max(mine, elsewhere):
        return []
    warning = (
        f"the distillation term ({', '.join(pure)}) is not least where the student equals the teacher: with the teacher's own "
        f"output it is {value:.3g}, and still has a gradient. Does it get what it expects, in the order that it expects "
        "(F.kl_div takes the student's log-probabilities first)?"
    )
    return [warning]


def _not_reached(task: Distillation, inputs: Any, targets: Any, of_teacher: Sequence[str]) -> list[str]:
    """Warn of student blocks that are trained, but not by the parts of the loss that come from the teacher."""
    model, teacher = task.student_blocks, task.teacher_blocks
    model.model.train()
    taught = _evaluated(teacher, inputs)
    with torch.enable_grad():
        parts = _values(task, model(copied(inputs)), taught, targets)
        total = torch.stack([parts[name].double() for name in of_teacher]).sum()
        trained = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(total, [*trained.values()], allow_unused=True) if total.requires_grad else ()
    reached = {name for name, gradient in zip(trained, found, strict=False) if gradient is not None}
    names = [[n for n, p in model.parameters_of(range(i, i + 1)).items() if p.requires_grad] for i in range(len(model))]
    left = [f"{i} ('{model.blocks[i].name}')" for i, own in enumerate(names) if own and not reached.intersection(own)]
    if not left:
        return []
    return [f"no gradient of the distillation term ({', '.join(of_teacher)}) reaches student block {', '.join(left)}"]
