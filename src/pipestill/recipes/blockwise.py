"""The workload of blockwise training: a teacher, the student's blocks, and the student that these make."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import nn
from torch.utils.data import DataLoader

from pipestill import draw
from pipestill.losses import DistillationLoss, Metric, SupervisedLoss
from pipestill.model.blocks import BlockModel
from pipestill.model.blockwise.task import Blockwise
from pipestill.model.tasks import Distillation, Supervised, Task
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES
from pipestill.plan.blockwise.plan_json import blockwise_plan_to_json
from pipestill.recipes.end_to_end import check_plan, make_trainer
from pipestill.recipes.evaluate import evaluate
from pipestill.recipes.recipe import SizedIterable
from pipestill.recipes.run_options import Kind, RunOptions
from pipestill.recipes.runner import Runner
from pipestill.recipes.standby import train_on_first
from pipestill.recipes.timelines import draw_blocks, trace_names
from pipestill.recipes.training import Training
from pipestill.recipes.weights import export, load_into, num_parameters
from pipestill.train.engine import REFERENCE
from pipestill.train.result import Result
from pipestill.train.run_directory import RunDirectory
from pipestill.train.trainer import Trainer


@dataclass(frozen=True)
class BlockwiseWorkload:
    """Everything that training a student block by block takes.

    Args:
        build: makes a fresh task, the same every time
        train_loader: batches of all training data
        validation_loader: batches that whole models are evaluated with
        supervised_loss: the loss of the teacher's training, and of the student's without a teacher
        metrics: functions of (output, target), by name
        teacher_training: how the teacher is trained, once
        student_training: how each block of the student is trained
        alone_training: how the student without a teacher is trained
        fine_tuning: how the assembled student is then trained as a whole (default: not at all)
        fine_tuning_loss: the distillation's loss in the fine-tuning
        derive: a function from the task to the network that is evaluated, exported and fine-tuned, such as a supernet's best
            path (default: the student itself)
        fresh: a function from that network to one of the same form as it is initialised, to be trained without a teacher
            (default: the student of a fresh task)
        block_loader: batches that the blocks are trained on (default: those of `train_loader`)
        rivals: networks to evaluate beside the one that was derived, by name; several of one name as their mean
        describe: a function from task and network to further entries of summary.json
    """

    kind: ClassVar[Kind] = "blockwise"
    strategies: ClassVar[tuple[str, ...]] = (REFERENCE, *BLOCKWISE_STRATEGIES)
    length_axis: ClassVar[int | None] = None

    build: Callable[[], Blockwise]
    train_loader: DataLoader[Any]
    validation_loader: DataLoader[Any]
    supervised_loss: SupervisedLoss
    metrics: Mapping[str, Metric]
    teacher_training: Training
    student_training: Training
    alone_training: Training
    fine_tuning: Training | None = None
    fine_tuning_loss: DistillationLoss | None = None
    derive: Callable[[Blockwise], nn.Module] | None = None
    fresh: Callable[[nn.Module], nn.Module] | None = None
    block_loader: SizedIterable | None = None
    rivals: Callable[[Blockwise], Mapping[str, Sequence[nn.Module]]] | None = None
    describe: Callable[[Blockwise, nn.Module], dict[str, Any]] | None = None

    @property
    def loader(self) -> SizedIterable:
        """Batches that the blocks are trained on."""
        return self.train_loader if self.block_loader is None else self.block_loader

    def task(self) -> Blockwise:
        """Build a fresh task of blockwise training."""
        return self.build()

    def trainer(self, task: Blockwise, options: RunOptions, **others: Any) -> Trainer:
        """Make the trainer of the blocks; see `Workload.trainer`."""
        names = ("devices", "strategy", "memory", "device", "seed", "log_every", "timeout_seconds")
        arguments = {name: getattr(options, name) for name in names}
        if others.get("costs") is None:
            arguments["costs"] = options.read_costs()
        return Trainer(task, **{**self.student_training.arguments(self.loader), **arguments, **others})

    def preflight(self, options: RunOptions) -> None:
        """Raise what can be seen to be wrong before anything is trained."""
        task = self.task()
        check_plan(self.trainer(task, options), self.loader)
        network = self.derive(task) if self.derive else task.student
        whole = end_to_end(options, task.teacher, network)
        trainings: list[tuple[Task, Training]] = [
            *self._fine_tuning(task.teacher, network),
            (Supervised(task.teacher, self.supervised_loss), self.teacher_training),
            (Supervised(network, self.supervised_loss), self.alone_training),
        ]
        for model, training in trainings:
            self._trainer_of(model, training, whole).preflight(self.train_loader)
        if options.teacher is not None:
            load_into(task.teacher, options.teacher)

    def run(self, options: RunOptions, runner: Runner) -> dict[str, Any]:
        """Train the teacher, the blocks, the network that they make as a whole, and that network without a teacher."""
        task, directory = self.task(), runner.directory
        metrics: dict[str, Any] = {"teacher": self._train_teacher(task.teacher, options, runner)}
        blocks = runner.train(
            "blocks", partial(self.trainer, task, options), self.loader, epochs=self.student_training.epochs, exports=False
        )
        network = self.derive(task) if self.derive else task.student
        metrics["blocks"] = metrics["student"] = self._evaluate(network, runner)
        for name, models in (self.rivals(task) if self.rivals else {}).items():
            several = [self._evaluate(model, runner) for model in models]
            metrics[name] = {key: sum(figures[key] for figures in several) / len(several) for key in several[0]}
        described = self.describe(task, network) if self.describe else {}
        if directory is not None:
            save_blocks(blocks, directory, options)
            export(network, directory / "export" / "model.safetensors")
        whole = end_to_end(options, task.teacher, network)
        for tuned, training in self._fine_tuning(task.teacher, network):
            if directory is not None:
                export(network, directory / "export" / "before_fine_tuning.safetensors")
            metrics["student"] = self._train_whole("fine-tuning", tuned, training, whole, runner)
        alone = Supervised(self.fresh(network) if self.fresh else self.task().student, self.supervised_loss)
        metrics["student_alone"] = self._train_whole("student alone", alone, self.alone_training, whole, runner)
        metrics["parameters"] = {"student": num_parameters(network), "teacher": num_parameters(task.teacher)}
        if directory is not None:
            export(network, directory / "export" / "model.safetensors")
        runner.write_config(network, described)
        summary = blocks.summary()
        summary["block_losses"] = summary.pop("losses")
        return {**summary, "metrics": metrics, **described}

    def _train_teacher(self, teacher: nn.Module, options: RunOptions, runner: Runner) -> dict[str, Any]:
        """Train the teacher, or read it from a file; returns its metrics."""
        if options.teacher is not None:
            load_into(teacher, options.teacher)
            return {"read_from": options.teacher, **self._evaluate(teacher, runner)}
        task = Supervised(teacher, self.supervised_loss)
        return self._train_whole("teacher", task, self.teacher_training, end_to_end(options, teacher), runner)

    def _fine_tuning(self, teacher: nn.Module, network: nn.Module) -> list[tuple[Distillation, Training]]:
        """The task of the fine-tuning and how it is trained, where there is one."""
        if self.fine_tuning is None or self.fine_tuning_loss is None:
            return []
        return [(Distillation(teacher, network, self.fine_tuning_loss), self.fine_tuning)]

    def _trainer_of(self, task: Task, training: Training, options: RunOptions, **others: Any) -> Trainer:
        """Make the trainer of a whole model."""
        return make_trainer(task, training, self.train_loader, options, metrics=self.metrics, **others)

    def _train_whole(self, name: str, task: Task, training: Training, options: RunOptions, runner: Runner) -> dict[str, float]:
        """Train a whole model on as many ranks as it has blocks at most; returns its metrics, on rank 0."""
        train = partial(
            runner.train, name, partial(self._trainer_of, task, training, options), self.train_loader, epochs=training.epochs,
            validate=self.validation_loader, inner=name.replace(" ", "_").replace("-", "_"),
        )  # fmt: skip
        return train_on_first(options.devices, name, task.student_blocks, options.timeout_seconds, train)

    def _evaluate(self, model: nn.Module, runner: Runner) -> dict[str, float]:
        return evaluate(model, self.metrics, self.validation_loader, runner.device)


def end_to_end(options: RunOptions, *models: nn.Module) -> RunOptions:
    """Give the options of whole models where blocks are trained by `options.strategy`: at most one stage for each block."""
    stages = min(options.devices, *(len(BlockModel(model)) for model in models))
    strategy = REFERENCE if options.strategy == REFERENCE else "fill"
    return dataclasses.replace(options, strategy=strategy, devices=stages, costs=None, memory=None)


def save_blocks(result: Result, directory: RunDirectory, options: RunOptions) -> None:
    """Write plan, timeline and traces of the blocks' training, where it had a plan."""
    if result.plan is None:
        return
    directory.write_json("plan.json", blockwise_plan_to_json(result.plan, options.memory))
    for name, trace in zip(trace_names(len(result.traces)), result.traces, strict=True):
        draw.write_chrome_trace(trace, directory / name)
    draw_blocks(result.plan, result.traces, directory / "timeline.svg")
