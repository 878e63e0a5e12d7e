"""Teacher-student training over pipelines whose bubbles the teacher fills."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipestill import cache as cache, data as data, losses as losses, lr_schedules as lr_schedules
    from pipestill.costs import Costs as Costs
    from pipestill.errors import PipestillError as PipestillError, RankFailure as RankFailure, UserError as UserError
    from pipestill.losses.step import step_number as step_number
    from pipestill.model.block import Block as Block
    from pipestill.model.blocks import BlockModel as BlockModel
    from pipestill.model.blockwise.task import Blockwise as Blockwise, batch_number as batch_number
    from pipestill.model.families.replay import cut_by_replay as cut_by_replay
    from pipestill.model.features import features as features
    from pipestill.model.tasks import Distillation as Distillation, Momentum as Momentum, Supervised as Supervised
    from pipestill.plan import Plan as Plan
    from pipestill.plan.blockwise.plan import BlockwisePlan as BlockwisePlan
    from pipestill.runtime.launch import launch as launch
    from pipestill.schedule.blockwise.profile import BlockProfile as BlockProfile
    from pipestill.train import callbacks as callbacks
    from pipestill.train.callbacks import Callback as Callback
    from pipestill.train.result import Result as Result
    from pipestill.train.trainer import Trainer as Trainer

__version__ = version("pipestill")

_HOMES = {
    "Block": "model.block",
    "BlockModel": "model.blocks",
    "BlockProfile": "schedule.blockwise.profile",
    "Blockwise": "model.blockwise.task",
    "BlockwisePlan": "plan.blockwise.plan",
    "Callback": "train.callbacks",
    "Costs": "costs",
    "Distillation": "model.tasks",
    "Momentum": "model.tasks",
    "PipestillError": "errors",
    "Plan": "plan",
    "RankFailure": "errors",
    "Result": "train.result",
    "Supervised": "model.tasks",
    "Trainer": "train.trainer",
    "UserError": "errors",
    "batch_number": "model.blockwise.task",
    "cut_by_replay": "model.families.replay",
    "features": "model.features",
    "launch": "runtime.launch",
    "step_number": "losses.step",
}
"""Public classes and functions, with the modules that they are in."""

_MODULES = {"cache": "cache", "callbacks": "train.callbacks", "data": "data", "losses": "losses", "lr_schedules": "lr_schedules"}
"""Public modules, with where they are."""

__all__ = sorted({*_HOMES, *_MODULES})  # type checkers read the imports above


def __getattr__(name: str) -> Any:
    """Import on first use: schedules are simulated and drawn without loading torch."""
    if name in _MODULES:
        return import_module(f"pipestill.{_MODULES[name]}")
    if name in _HOMES:
        return getattr(import_module(f"pipestill.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pipestill' has no attribute '{name}'")


def __dir__() -> list[str]:
    """The public names, whether they were imported yet or not."""
    return sorted([*__all__, "__version__"])
