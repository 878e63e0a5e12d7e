"""How much the loss and the gradients of one batch depend on the number of its microbatches."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pipestill.model.batchnorm import Norms
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.stepwise import modules_of, restored
from pipestill.model.tasks import Distillation, Task, teacher_trains
from pipestill.optim import Schedules
from pipestill.runtime.batch import Batch
from pipestill.runtime.pipeline.reference import Reference
from pipestill.runtime.settings import PipelineSettings


@dataclass(frozen=True, slots=True)
class MicrobatchDifference:
    """How far a batch in several microbatches is from the same batch in one.

    Args:
        relative: the larger one of two: the difference of the losses as a fraction of the loss, and the norm of the difference of
            all gradients as a fraction of their norm; None where they say nothing about the loss
        reason: why there is none, else empty
    """

    relative: float | None
    reason: str = ""


def microbatch_difference(
    task: Task, contracts: PipelineContracts, batch: Batch, num_microbatches: int, *, frozen_norms: bool
) -> MicrobatchDifference:
    """Compare the loss and the gradients of one batch in 1 and in several microbatches, and leave no trace in the models.

    Dropout is left out: the student runs in eval mode.

    Args:
        task: the models, on the CPU, and the loss
        contracts: those of the task
        batch: what is compared
        num_microbatches: how many microbatches beside 1
        frozen_norms: whether batch norm normalises by its running statistics in training too
    """
    if isinstance(task, Distillation) and task.fuse_heads:  # a student in eval mode applies its head itself
        task = dataclasses.replace(task, fuse_heads=False)
    models = [("student", task.student_blocks), *([("teacher", task.teacher_blocks)] if teacher_trains(task) else [])]
    norms = [
        f"'{name}' of the {role}"
        for role, model in models
        if model is not None and not frozen_norms
        for name, module in model.model.named_modules()
        if isinstance(module, _BatchNorm)
    ]
    if norms:
        return MicrobatchDifference(None, f"batch norm ({norms[0]}) normalises over the rows of a microbatch, so results differ")
    whole, again, parts = (_gradients(task, contracts, batch, *way) for way in ((1, 0), (1, 1), (num_microbatches, 0)))
    if _apart(whole, again) > 0.0:
        return MicrobatchDifference(None, "the loss or the teacher draws random numbers, anew for each microbatch")
    return MicrobatchDifference(_apart(whole, parts))


_Gradients = tuple[float, list[Tensor]]
"""The loss of a batch, and the gradient of each parameter that got one."""


def _gradients(task: Task, contracts: PipelineContracts, batch: Batch, num_microbatches: int, seed: int) -> _Gradients:
    """The loss and the gradients by the plain loop."""
    settings = PipelineSettings(
        seed=seed, log_every=1, optimizer=lambda named: torch.optim.SGD(named.values(), lr=0.0), schedules=Schedules(0.0),
        timeout_seconds=math.inf, metrics={}, validate=False, norms=Norms(), largest_norm=None,
    )  # fmt: skip
    with restored(modules_of(task)):
        reference = Reference(task, contracts, settings, torch.device("cpu"), num_microbatches)
        reference.student.in_mode(train=False)
        losses = reference.accumulate_gradients(0, batch)
        return math.fsum(losses.values()), [p.grad.double() for p in reference.trained.values() if p.grad is not None]


def _apart(one: _Gradients, other: _Gradients) -> float:
    """The relative difference of two losses or of their gradients, the larger one."""
    norm = math.sqrt(math.fsum(float(g.square().sum()) for g in one[1]))
    distance = math.sqrt(math.fsum(float((a - b).square().sum()) for a, b in zip(one[1], other[1], strict=True)))
    tiny = torch.finfo(torch.float64).tiny
    return max(abs(one[0] - other[0]) / max(abs(one[0]), tiny), distance / max(norm, tiny))
