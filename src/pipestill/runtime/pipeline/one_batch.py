"""How much the loss and the gradients of one batch depend on the number of its microbatches."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipestill.model.batchnorm import Norms
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.stepwise import modules_of, restored
from pipestill.model.tasks import Distillation, Momentum, Task, teacher_trains
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
    models: list[tuple[str, nn.Module]] = [(beside.name, beside.module) for beside in task.feature_losses.beside]
    if not frozen_norms:
        models.append(("the student", task.student))
    if isinstance(task, Momentum) and teacher_trains(task) and not frozen_norms:
        models.append(("the teacher", task.teacher))
    named = ((role, name, module) for role, model in models for name, module in model.named_modules())
    norms = [f"'{name}' of {role}" for role, name, module in named if isinstance(module, _BatchNorm)]
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
        task.student.training = isinstance(task, Distillation) and task.fuse_heads  # else it applies its head itself
        losses = reference.accumulate_gradients(0, batch)
        return math.fsum(losses.values()), [p.grad.double() for p in reference.trained.values() if p.grad is not None]


def _apart(one: _Gradients, other: _Gradients) -> float:
    """The relative difference of two losses or of their gradients, the larger one."""
    norm = math.sqrt(math.fsum(float(g.square().sum()) for g in one[1]))
    distance = math.sqrt(math.fsum(float((a - b).square().sum()) for a, b in zip(one[1], other[1], strict=True)))
    tiny = torch.finfo(torch.float64).tiny
    return max(abs(one[0] - other[0]) / max(abs(one[0]), tiny), distance / max(norm, tiny))
