"""A recipe is a frozen dataclass of options; it builds a workload: models, data, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader

from pipestill.errors import ConfigError
from pipestill.losses import DistillationLoss, Metric, SupervisedLoss
from pipestill.lr_schedules import LrSchedule
from pipestill.model.blockwise.task import Blockwise
from pipestill.model.tasks import Distillation, Momentum
from pipestill.optim import LARS
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES
from pipestill.recipes.run_options import Numbers
from pipestill.schedule import PIPELINE_STRATEGIES
from pipestill.train.engine import REFERENCE

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "lars": LARS,
}  # fmt: skip


Kind = Literal["pipeline", "blockwise"]


class SizedIterable(Protocol):
    """A loader that knows how many batches a pass has."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Training:
    """How one model is trained.

    `lr_schedule(total_steps)` and `weight_decay_schedule(total_steps)` give factors per step, `param_groups` the optimizer's
    groups of a model's named parameters.
    """

    epochs: int
    optimizer: type[torch.optim.Optimizer]
    lr: float
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    lr_schedule: Callable[[int], LrSchedule] | None = None
    param_groups: Callable[[dict[str, nn.Parameter]], list[dict[str, Any]]] | None = None
    weight_decay_schedule: Callable[[int], LrSchedule] | None = None

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of some of the model's parameters."""
        made: Callable[..., torch.optim.Optimizer] = self.optimizer
        return made(parameters, lr=self.lr, **self.optimizer_options)

    def factor(self, loader: Sized) -> LrSchedule | None:
        """The rate's factor per step for training on `loader`."""
        return self.lr_schedule(self.epochs * len(loader)) if self.lr_schedule else None

    def decay_factor(self, loader: Sized) -> LrSchedule | None:
        """The weight decay's factor per step."""
        return self.weight_decay_schedule(self.epochs * len(loader)) if self.weight_decay_schedule else None


class Workload(Protocol):
    """What a recipe builds, of whatever kind: models, data, and how they are trained.

    Commands, comparisons and proofs ask a workload; none asks which class it is. (The methods that need a trainer, `trainer`,
    `preflight` and `run`, join this protocol when there is one Trainer:

    - `trainer(task, options, **others) -> Trainer`: the trainer of the training that strategies are about; `others` are
      arguments of `ps.Trainer` that replace what the options and the workload give, such as `costs` or `callbacks`;
    - `preflight(options)`: raise what can be seen to be wrong before anything is trained;
    - `run(options, directory, quiet, description) -> dict`: train everything, and return the summary on rank 0.)
    """

    @property
    def kind(self) -> Kind:
        """How the student is trained: as a pipeline's stages, or block by block."""

    @property
    def strategies(self) -> tuple[str, ...]:
        """Names of the strategies that can train it, `reference` first."""

    @property
    def loader(self) -> SizedIterable:
        """Batches of the training that strategies are about."""

    @property
    def train_loader(self) -> DataLoader[Any]:
        """Batches of all training data, with labels where there are any; its `batch_size` is the recipe's."""

    @property
    def length_axis(self) -> int | None:
        """The axis whose size may differ between batches (see `Trainer`), or None where all batches are alike."""

    def task(self) -> Any:
        """Build a fresh task, the same every time."""


@dataclass(frozen=True)
class DistillationWorkload:
    """Everything that distilling one student takes. Builders give freshly initialised models, the same every time.

    `length_axis`: batches may differ in the size of that axis (see `Trainer`). `prepare(teacher, student)` is called once the
    teacher is what it will be, to initialise the student from it; the student without a teacher stays as it was built.
    `teacher_origin`: where the teacher comes from if it is not trained here, for the summary. `conclude(metrics)`: more
    entries of the summary that follow from the means of the metrics.
    """

    kind: ClassVar[Kind] = "pipeline"
    strategies: ClassVar[tuple[str, ...]] = (REFERENCE, *PIPELINE_STRATEGIES)

    build_teacher: Callable[[], nn.Module]
    build_student: Callable[[], nn.Module]
    loss: DistillationLoss
    supervised_loss: SupervisedLoss
    metrics: Mapping[str, Metric]
    train_loader: DataLoader[Any]
    validation_loader: DataLoader[Any]
    teacher_training: Training
    student_training: Training
    length_axis: int | None = None
    prepare: Callable[[nn.Module, nn.Module], None] | None = None
    teacher_origin: str | None = None
    conclude: Callable[[Mapping[str, float]], dict[str, float]] | None = None

    @property
    def loader(self) -> SizedIterable:
        """Batches that the student is trained on."""
        return self.train_loader

    def task(self) -> Distillation:
        """What a schedule runs: the distillation, of fresh models."""
        return self.distil(self.build_teacher(), self.build_student())

    def distil(self, teacher: nn.Module, student: nn.Module) -> Distillation:
        """The distillation of a teacher that is ready into a student that was built; `prepare` is called here."""
        if self.prepare is not None:
            self.prepare(teacher, student)
        return Distillation(teacher, student, self.loss)


@dataclass(frozen=True)
class MomentumWorkload:
    """Everything that training with a momentum teacher takes.

    `build()` gives a fresh task, the same every time. `evaluate(teacher, device)` gives metrics of what has been learnt, by
    labels that training never sees, computed on a device; it gets the teacher, and the same network untrained.
    """

    kind: ClassVar[Kind] = "pipeline"
    strategies: ClassVar[tuple[str, ...]] = (REFERENCE, *PIPELINE_STRATEGIES)
    length_axis: ClassVar[int | None] = None

    build: Callable[[], Momentum]
    evaluate: Callable[[nn.Module, torch.device], dict[str, float]]
    train_loader: DataLoader[Any]
    student_training: Training
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    @property
    def loader(self) -> SizedIterable:
        """Batches that the student is trained on."""
        return self.train_loader

    def task(self) -> Momentum:
        """What a schedule runs."""
        return self.build()


@dataclass(frozen=True)
class BlockwiseWorkload:
    """Everything that training a student block by block takes.

    `build()` gives a fresh task, the same every time; its teacher is trained once, with `supervised_loss`. The blocks' rate
    is a factor of `student_training` per batch. With `fine_tuning`, the assembled student is then trained end to end with
    `fine_tuning_loss`. `derive(task)`: the network that is evaluated, exported and fine-tuned, where it is not the student
    itself (a supernet's best path). `fresh(network)`: one of the same form as it is initialised, to be trained without a
    teacher by `alone_training` (default: the student of a fresh task).

    `block_loader`: what the blocks are trained on where it is not `train_loader`. `rivals(task)`: networks to evaluate beside
    the one that was derived, several of a kind as their mean. `describe(task, network)`: more entries of summary.json.
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
        """What a schedule runs: the student blocks, each alone."""
        return self.build()


EndToEndWorkload = DistillationWorkload | MomentumWorkload
AnyWorkload = EndToEndWorkload | BlockwiseWorkload


class Recipe(Protocol):
    """A frozen dataclass whose fields are the options on the command line.

    A class may have `run_defaults`, values of `RunOptions` that it starts from instead of those of other recipes.
    """

    name: ClassVar[str]

    def workload(self, seed: int, num_samples: int | None = None) -> AnyWorkload:
        """Build it; `num_samples` keeps only the first training samples."""


def filled(recipe: Any, preset: Mapping[str, Any]) -> None:
    """Put the preset's value in place of every option that is None; for a frozen dataclass as it is made.

    Sequences of numbers become `Numbers`, as they are where the command line gives them.
    """
    for name, value in vars(recipe).items():
        chosen = preset.get(name) if value is None else value
        object.__setattr__(recipe, name, Numbers(chosen) if isinstance(chosen, (tuple, list)) else chosen)


def end_to_end(recipe: Recipe, seed: int, num_samples: int | None = None, *, what: str) -> EndToEndWorkload:
    """The recipe's workload; `ConfigError` for one that trains block by block, where `what` is of pipelines alone."""
    workload = recipe.workload(seed, num_samples)
    if isinstance(workload, BlockwiseWorkload):
        raise ConfigError(f"{what}, and recipe '{recipe.name}' trains block by block, without one")
    return workload


def warmed_up(schedule: Callable[..., LrSchedule], fraction: float) -> Callable[[int], LrSchedule]:
    """Make a function from the number of steps to `schedule`, which is that of cosine or linear, with a warm-up over that
    fraction of them.
    """
    return lambda total_steps: schedule(total_steps, warm_up_steps=min(round(fraction * total_steps), total_steps))


def without_decay(parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Groups for an optimizer: weights, and what has at most one dimension (biases, norms), which does not decay."""
    decayed, plain = ([p for p in parameters.values() if (p.dim() > 1) is weights] for weights in (True, False))
    return [group for group in ({"params": decayed}, {"params": plain, "weight_decay": 0.0}) if group["params"]]
