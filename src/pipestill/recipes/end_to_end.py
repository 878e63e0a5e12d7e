"""What workloads have in common whose student is trained as a whole, by a pipeline or a plain loop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.utils.data import DataLoader

from pipestill import draw
from pipestill.losses import Metric
from pipestill.model.tasks import Supervised, Task
from pipestill.recipes.recipe import SizedIterable
from pipestill.recipes.run_options import Kind, RunOptions
from pipestill.recipes.timelines import draw_pipeline, trace_names
from pipestill.recipes.training import Training
from pipestill.runtime.world import OneProcess
from pipestill.schedule import PIPELINE_STRATEGIES
from pipestill.train.engine import REFERENCE
from pipestill.train.result import Result
from pipestill.train.run_directory import RunDirectory
from pipestill.train.trainer import Trainer

_OF_ALL = (
    "devices", "microbatches", "split_backward", "stash", "clip_grad_norm", "batch_norm", "device", "seed", "log_every",
    "timeout_seconds",
)  # fmt: skip
_OF_THE_STUDENT = ("run_ahead", "staleness", "student_partition", "teacher_partition", "memory")


def make_trainer(task: Task, training: Training, loader: SizedIterable, options: RunOptions, **others: Any) -> Trainer:
    """Make the trainer of a model that is trained as a whole.

    Costs, partitions and the limit of memory that the options give are those of the distillation, so a supervised model's
    blocks are measured, and their partition is levelled anew.

    Args:
        task: what is trained
        training: how it is trained
        loader: the batches that it is trained on
        options: how the run trains
        others: further arguments of `Trainer`, which win over those that follow from the options
    """
    alone = isinstance(task, Supervised)
    arguments = {name: getattr(options, name) for name in (_OF_ALL if alone else (*_OF_ALL, *_OF_THE_STUDENT))}
    # Without a teacher, this is what is left of them.
    arguments["strategy"] = "1f1b" if alone and options.strategy in ("tspipe", "async") else options.strategy
    if not alone and others.get("costs") is None:
        arguments["costs"] = options.read_costs()
    return Trainer(task, **{**training.arguments(loader), **arguments, **others})


def check_plan(trainer: Trainer, loader: SizedIterable) -> None:
    """Raise what is wrong before a run; what blocks hold is measured first where memory is limited and no costs are given."""
    if trainer.memory_bytes is not None and trainer.costs is None:
        trainer.plan(loader, world=OneProcess(trainer.devices))
    else:
        trainer.preflight(loader)


@dataclass(frozen=True, kw_only=True)
class EndToEndWorkload:
    """Data and training of a student that is trained as a whole.

    Args:
        train_loader: batches that the student is trained on
        student_training: how the student is trained
        metrics: functions of (output, target), by name
        length_axis: the axis whose size may differ between batches (see `Trainer`; default: all batches are alike)
    """

    kind: ClassVar[Kind] = "pipeline"
    strategies: ClassVar[tuple[str, ...]] = (REFERENCE, *PIPELINE_STRATEGIES)

    train_loader: DataLoader[Any]
    student_training: Training
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    length_axis: int | None = None

    @property
    def loader(self) -> DataLoader[Any]:
        """Batches that the student is trained on."""
        return self.train_loader

    def trainer(self, task: Task, options: RunOptions, **others: Any) -> Trainer:
        """Make the trainer of the student; see `Workload.trainer`."""
        return self._trainer_of(task, self.student_training, options, **others)

    def _trainer_of(self, task: Task, training: Training, options: RunOptions, **others: Any) -> Trainer:
        """Make the trainer of one of the workload's models."""
        mine = {"metrics": self.metrics, "length_axis": self.length_axis}
        return make_trainer(task, training, self.train_loader, options, **{**mine, **others})


def save_plan(result: Result, directory: RunDirectory | None) -> None:
    """Write plan, trace and timeline of a pipeline's run, where there are a directory and a plan."""
    if directory is None or result.plan is None or result.trace is None:
        return
    directory.write_json("plan.json", result.plan.to_json())
    draw.write_chrome_trace(result.trace, directory / trace_names()[0])
    draw_pipeline(result.plan, result.trace, directory / "timeline.svg")
