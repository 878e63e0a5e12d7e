"""Tries out, before training, what would otherwise fail in the middle of it: an optimizer's step, batch norm of one row."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipestill.errors import ConfigError, ModelError
from pipestill.model.blocks import BlockModel
from pipestill.model.nests import copied
from pipestill.model.stepwise import untouched
from pipestill.model.tasks import Task, teacher_trains, view
from pipestill.optim import OptimizerFactory

NO_SINGLE_ROWS = "give the loader drop_last=True or another batch size, take fewer microbatches, or batch_norm='frozen'"
"""What to do about microbatches of one row."""


def try_optimizer(model: BlockModel, make: OptimizerFactory, device: torch.device) -> None:
    """Take an optimizer's first step on copies of each kind of block's weights; `ConfigError` where it fails.

    The gradients are zero. What cannot be made of one block's weights alone is left to the stages, which have several.
    """
    tried = set[tuple[Any, ...]]()
    for i in range(len(model)):
        trained = {name: p for name, p in model.parameters_of(range(i, i + 1)).items() if p.requires_grad}
        form = tuple((tuple(p.shape), p.dtype) for p in trained.values())
        if not trained or form in tried:
            continue
        tried.add(form)
        copies = {name: nn.Parameter(p.detach().to(device, copy=True)) for name, p in trained.items()}
        for parameter in copies.values():
            parameter.grad = torch.zeros_like(parameter)
        try:
            optimizer = make(copies)
        except ConfigError:
            continue
        try:
            optimizer.step()
        except Exception as error:
            raise ConfigError(
                f"the optimizer {type(optimizer).__name__} fails in its first step, on the weights of student block {i} "
                f"('{model.blocks[i].name}') on {device}: {type(error).__name__}: {' '.join(str(error).split())}; choose another "
                "one, or other optimizer_options"
            ) from error


def why_no_single_row(task: Task, inputs: Any) -> str | None:
    """The first block whose batch norm cannot take the one row of `inputs` in train mode; None where all blocks can."""
    models = [("student", task.student_blocks)]
    if task.teacher_blocks is not None and teacher_trains(task):
        models.append(("teacher", task.teacher_blocks))
    for role, model in models:
        if not any(isinstance(module, _BatchNorm) for module in model.model.modules()):
            continue
        with untouched(task), torch.no_grad():
            value = copied(view(task, inputs, 0))
            for i, block in enumerate(model.blocks):
                try:
                    value = block.call(value)
                except ValueError as error:
                    return f"{role} block {i} ('{block.name}')" if is_of_one_row(error) else None
    return None


def is_of_one_row(error: ValueError) -> bool:
    """Whether an error is that of a batch norm which was given one value of each channel."""
    return "more than 1 value per channel" in str(error)


def refuse_single_row(error: ValueError, where: str, step: int) -> None:
    """Raise a `ModelError` with the block, the batch and the remedy, where an error is that of a batch norm of one row."""
    if is_of_one_row(error):
        raise ModelError(
            f"batch {step + 1} has a microbatch of one row, and batch norm in {where} needs more than one value of each channel; "
            f"{NO_SINGLE_ROWS}"
        ) from error
