"""Teacher-student training over pipelines whose bubbles the teacher fills."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipestill import losses
    from pipestill.errors import PipestillError, RankFailure, UserError
    from pipestill.model.block import Block
    from pipestill.model.blocks import BlockModel
    from pipestill.model.blockwise.task import Blockwise
    from pipestill.model.blockwise.training import batch_number
    from pipestill.model.tasks import Distillation, Momentum, Supervised
    from pipestill.plan import Plan
    from pipestill.runtime.launch import launch
    from pipestill.schedule.blockwise.profile import BlockProfile
    from pipestill.train.blockwise import BlockResult, BlockwiseTrainer
    from pipestill.train.pipeline import Trainer
    from pipestill.train.result import Result

__version__ = version("pipestill")

_HOMES = {
    "Block": "pipestill.model.block",
    "BlockModel": "pipestill.model.blocks",
    "BlockProfile": "pipestill.schedule.blockwise.profile",
    "BlockResult": "pipestill.train.blockwise",
    "Blockwise": "pipestill.model.blockwise.task",
    "BlockwiseTrainer": "pipestill.train.blockwise",
    "Distillation": "pipestill.model.tasks",
    "Momentum": "pipestill.model.tasks",
    "PipestillError": "pipestill.errors",
    "Plan": "pipestill.plan",
    "RankFailure": "pipestill.errors",
    "Result": "pipestill.train.result",
    "Supervised": "pipestill.model.tasks",
    "Trainer": "pipestill.train.pipeline",
    "UserError": "pipestill.errors",
    "batch_number": "pipestill.model.blockwise.training",
    "launch": "pipestill.runtime.launch",
}

__all__ = [
    "Block",
    "BlockModel",
    "BlockProfile",
    "BlockResult",
    "Blockwise",
    "BlockwiseTrainer",
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
    "launch",
    "losses",
]


def __getattr__(name: str) -> Any:
    """Import on first use: schedules are simulated and drawn without loading torch."""
    if name == "losses":
        return import_module("pipestill.losses")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pipestill' has no attribute '{name}'")
