"""How a recipe is run: the options that all recipes share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipestill.arguments import parse_bytes
from pipestill.costs import Costs
from pipestill.schedule.blockwise.profile import BlockProfile

Kind = Literal["pipeline", "blockwise"]
"""How a student is trained: as the stages of a pipeline, or block by block."""

COSTS_SUFFIXES: dict[Kind, str] = {"pipeline": ".json", "blockwise": ".csv"}
"""How the name of a file of costs ends: costs of a pipeline's blocks, or a profile for blockwise training."""


def kind_of_costs(path: str) -> Kind:
    """The kind of training that a file of costs is for, by the end of its name."""
    return "blockwise" if Path(path).suffix.lower() == COSTS_SUFFIXES["blockwise"] else "pipeline"


def read_costs(path: str) -> Costs | BlockProfile:
    """Read a file of costs of either kind; `ConfigError` where it cannot be read."""
    return BlockProfile.load(path) if kind_of_costs(path) == "blockwise" else Costs.load(path)


class Numbers(tuple[int, ...]):
    """Whole numbers that are written 2,1,3 on the command line and [2, 1, 3] in YAML."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: Any) -> Numbers:
        """Read numbers from text with commas, or from a sequence; `ValueError` for anything else."""
        items = text.strip("[]").split(",") if isinstance(text, str) and text.strip("[]") else text
        if items in ("", "[]"):
            return cls()
        try:
            return cls(int(item) for item in items)
        except (TypeError, ValueError):
            raise ValueError(f"expected whole numbers such as 3,3, got {text!r}") from None


class NumBytes(int):
    """An amount of memory in bytes, written 80GB, 512MiB or as a number (see `parse_bytes`)."""

    __slots__ = ()

    @classmethod
    def parse(cls, amount: Any) -> NumBytes:
        """Read an amount; `ConfigError` where it is none."""
        return cls(parse_bytes(amount))


@dataclass(frozen=True)
class RunOptions:
    """How a recipe is run.

    Args:
        devices: pipeline stages, or ranks that train blocks; each is one process with one device
        strategy: reference, sequential, gpipe, 1f1b, tspipe, async or fill for a pipeline; reference, dp, ls, relay, relay-dpu,
            hybrid or balanced for a recipe that trains block by block
        microbatches: slices of a batch whose gradients add up, where a model is trained end to end
        staleness: steps by which the weights of a momentum teacher under 'fill' may be old: 0 is exact, 1 is faster (default: 0)
        split_backward: let 'fill' compute gradients of weights apart from those of inputs, and fill bubbles with them
        stash: most microbatches that a rank of 'fill' holds between forward and backward: a number, n (as many as there are
            stages), 2n-1 or all (default: n, and 2n-1 with split backwards)
        clip_grad_norm: largest norm of all gradients together, where a model is trained end to end (default: no limit)
        batch_norm: when the running statistics of batch norm move: with each microbatch, once a batch (deferred), or never
            (frozen)
        run_ahead: most microbatches that the teacher of 'fill' may be ahead of the student (default: as many as help)
        student_partition: blocks of each student stage, such as 3,3 (default: levelled by the costs)
        teacher_partition: blocks of each teacher stage, such as 3,3 (default: levelled by the costs)
        costs: a file of costs to plan with, as 'pipestill profile' writes it: a .json for a pipeline, a .csv for a recipe that
            trains block by block (default: measure them)
        memory: most memory that the student's training may hold on a device, such as 80GB (default: no limit)
        teacher: a model.safetensors of an earlier run to read the teacher from (default: train one)
        device: cpu or cuda (default: cuda where there are enough devices)
        seed: seed of the initial weights, of the order of the data and of dropout
        log_every: steps between two lines of metrics.jsonl
        threads: CPU threads of each process (default: the cores, divided evenly)
        timeout_seconds: deadline of every wait, in seconds
    """

    devices: int = 1
    strategy: str = "fill"
    microbatches: int = 8
    staleness: int | None = None
    split_backward: bool = False
    stash: int | str | None = None
    clip_grad_norm: float | None = None
    batch_norm: Literal["microbatch", "deferred", "frozen"] = "microbatch"
    run_ahead: int | None = None
    student_partition: Numbers | None = None
    teacher_partition: Numbers | None = None
    costs: str | None = None
    memory: NumBytes | None = None
    teacher: str | None = None
    device: str | None = None
    seed: int = 0
    log_every: int = 10
    threads: int | None = None
    timeout_seconds: float = 600.0

    def as_reference(self) -> RunOptions:
        """Give the options of the same training as a plain loop on one device."""
        return replace(
            self, strategy="reference", devices=1, run_ahead=None, split_backward=False, stash=None, staleness=None,
            student_partition=None, teacher_partition=None, costs=None, memory=None,
        )  # fmt: skip

    def read_costs(self) -> Costs | BlockProfile | None:
        """Read the file of costs, where one is named."""
        return None if self.costs is None else read_costs(self.costs)
