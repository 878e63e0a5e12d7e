"""Teacher-student training over pipelines whose bubbles the teacher fills."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipestill import losses, lr_schedules
    from pipestill.costs import Costs
    from pipestill.errors import PipestillError, RankFailure, UserError
    from pipestill.model.block import Block
    from pipestill.model.blocks import BlockModel
    from pipestill.model.blockwise.task import Blockwise
    from pipestill.model.blockwise.training import batch_number
    from pipestill.model.tasks import Distillation, Momentum, Supervised
    from pipestill.plan import Plan
    from pipestill.plan.blockwise.plan import BlockwisePlan
    from pipestill.runtime.launch import launch
    from pipestill.schedule.blockwise.profile import BlockProfile
    from pipestill.train import callbacks
    from pipestill.train.callbacks import Callback
    from pipestill.train.result import Result
    from pipestill.train.trainer import Trainer

__version__ = version("pipestill")

_MODULES = {
    "callbacks": "pipestill.train.callbacks",
    "losses": "pipestill.losses",
    "lr_schedules": "pipestill.lr_schedules",
}
"""Public names that are modules, with where they are."""

_HOMES = {
    "Block": "pipestill.model.block",
    "BlockModel": "pipestill.model.blocks",
    "BlockProfile": "pipestill.schedule.blockwise.profile",
    "Blockwise": "pipestill.model.blockwise.task",
    "BlockwisePlan": "pipestill.plan.blockwise.plan",
    "Callback": "pipestill.train.callbacks",
    "Costs": "pipestill.costs",
    "Distillation": "pipestill.model.tasks",
    "Momentum": "pipestill.model.tasks",
    "PipestillError": "pipestill.errors",
    "Plan": "pipestill.plan",
    "RankFailure": "pipestill.errors",
    "Result": "pipestill.train.result",
    "Supervised": "pipestill.model.tasks",
    "Trainer": "pipestill.train.trainer",
    "UserError": "pipestill.errors",
    "batch_number": "pipestill.model.blockwise.training",
    "launch": "pipestill.runtime.launch",
}
"""Public classes and functions, with the modules that they are in."""

__all__ = [
    "Block",
    "BlockModel",
    "BlockProfile",
    "Blockwise",
    "BlockwisePlan",
    "Callback",
    "Costs",
    "Distillation",
    "Momentum",
    "PipestillError",
    "Plan",
    "RankFailure",
    "Result",
    "Supervised",
    "Trainer",
    "UserError",
    "batch_number",
    "callbacks",
    "launch",
    "losses",
    "lr_schedules",
]


def __getattr__(name: str) -> Any:
    """Import on first use: schedules are simulated and drawn without loading torch."""
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pipestill' has no attribute '{name}'")


def __dir__() -> list[str]:
    """The public names, whether they were imported yet or not."""
    return sorted([*__all__, "__version__"])
