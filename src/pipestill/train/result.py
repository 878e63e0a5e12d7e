"""The result of a run, as a value."""

import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from pipestill.schedule import Trace


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures that an engine knows of a run that is over. The defaults are those of a plain loop.

    Times are wall-clock seconds; a step is one update of the student, or of every block of it in blockwise training.
    """

    steps: int
    """Steps that were trained."""
    samples: int
    """Rows of all batches of these steps."""
    seconds: float
    """From the first step to the last, validations included."""
    seconds_per_step: float
    """Median of the steady state."""
    utilisation: float = 1.0
    """Busy fraction of rank-time in the steady state, 0 to 1."""
    bubble: float = 0.0
    """1 - utilisation."""
    predicted_seconds_per_step: float | None = None
    """What the plan expected; None for `reference`, which has no plan."""
    limit_seconds_per_step: float | None = None
    """No schedule of this partition can be faster; None for `reference`."""
    staleness: int = 0
    """Updates by which the weights that a step reads may be old; 0 is exact."""
    exact: bool | str = True
    """True where weights equal those of the plain loop bit by bit, else the reason why not."""
    metrics: dict[str, float]
    """The last logged loss ("loss"), and the metrics of the last validation."""
    losses: dict[str, float]
    """The last logged loss by part; in blockwise training, by the name of the block."""
    beside: dict[str, Tensor] = field(repr=False, default_factory=dict)
    """Tensors of losses and projectors, which are no part of the student, by name and on the CPU; empty without any."""
    whole_backwards: tuple[str, ...] = ()
    """Blocks whose backward stayed whole where `split_backward` was asked for, and why."""
    traces: tuple[Trace, ...] = field(repr=False, default=())
    """What each rank did when: one trace, or one for each phase of blockwise training; none for `reference`."""


@dataclass(frozen=True, kw_only=True)
class Result(Figures):
    """The result of a run, for any kind of task. It is complete on the process of rank 0 only."""

    strategy: str
    """Name of the strategy."""
    devices: int
    """Number of ranks."""
    backend: str
    """What moved tensors between the ranks, such as "shared memory", "nccl" or "in-process cpu"."""
    peak_memory_bytes: list[int]
    """By rank: most that CUDA's allocator held, or resident memory of the process on the CPU."""
    plan: Any = field(repr=False, default=None)
    """The `Plan`, or the `BlockwisePlan` of blockwise training; None for `reference`."""

    @property
    def trace(self) -> Trace | None:
        """The only trace; None where there is none, or where there are several."""
        return self.traces[0] if len(self.traces) == 1 else None

    def summary(self) -> dict[str, Any]:
        """The figures as values for JSON, with `samples_per_second` and the `versions` of packages."""
        values = {name: value for name, value in vars(self).items() if name not in ("plan", "traces", "beside")}
        return {**values, "samples_per_second": self.samples / self.seconds, "versions": package_versions()}


def package_versions() -> dict[str, str]:
    """The versions of the packages that a run's results depend on, by name."""
    return {"pipestill": version("pipestill"), "torch": torch.__version__, "python": platform.python_version()}
