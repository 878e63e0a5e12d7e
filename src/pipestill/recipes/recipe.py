"""What a recipe is: a frozen dataclass of options that builds a workload, which is models, data and how they are trained."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

from torch.utils.data import DataLoader

from pipestill.recipes.run_options import Kind, Numbers, RunOptions
from pipestill.recipes.runner import Runner
from pipestill.train.trainer import Trainer


class SizedIterable(Protocol):
    """A loader that knows how many batches a pass has."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class Workload(Protocol):
    """What a recipe builds, of whatever kind: models, data, and how they are trained.

    Commands, comparisons and proofs ask a workload; none asks which class it is.
    """

    @property
    def kind(self) -> Kind:
        """How the student is trained: as the stages of a pipeline, or block by block."""

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
        """Build a fresh task, the same every time, for the training that strategies are about."""

    def trainer(self, task: Any, options: RunOptions, **others: Any) -> Trainer:
        """Make the trainer of the training that strategies are about.

        Args:
            task: a task as `task` builds it
            options: how to train; where they name a file of costs, it is read
            others: arguments of `Trainer` that replace what the workload and the options give, such as `costs` or `callbacks`
        """

    def preflight(self, options: RunOptions) -> None:
        """Raise the `UserError`s of everything that can be seen to be wrong before anything is trained.

        Blocks are measured only where a limit of memory is given and no file of costs.
        """

    def run(self, options: RunOptions, runner: Runner) -> dict[str, Any]:
        """Train everything that belongs to the experiment, on every rank of the world that this process is in.

        Files go to the runner's directory. Returns what summary.json holds beside the recipe's name, complete on rank 0.
        """


class Recipe(Protocol):
    """A frozen dataclass whose fields are the options on the command line.

    A class may have `run_defaults`, values of `RunOptions` that it starts from instead of those of other recipes.
    """

    name: ClassVar[str]

    def workload(self, seed: int, num_samples: int | None = None) -> Workload:
        """Build models and data; `num_samples` keeps only the first training samples."""


def filled(recipe: Any, preset: Mapping[str, Any]) -> None:
    """Put the preset's value in place of every option that is None; for a frozen dataclass as it is made.

    Sequences of numbers become `Numbers`, as they are where the command line gives them.
    """
    for name, value in vars(recipe).items():
        chosen = preset.get(name) if value is None else value
        object.__setattr__(recipe, name, Numbers(chosen) if isinstance(chosen, (tuple, list)) else chosen)
