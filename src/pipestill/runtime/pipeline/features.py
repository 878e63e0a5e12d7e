"""Feature losses while stages run: graphs that are cut after the blocks that they compare, and their evaluation."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipestill.losses.step import at_step
from pipestill.model.boundary import Detached, SplitBlock
from pipestill.model.features import FeatureLosses
from pipestill.model.pipeline_contracts import PipelineContracts
from pipestill.model.tasks import Task


class Taught(NamedTuple):
    """What a forward of teacher blocks gives."""

    output: Any
    """The value after the last of them; None where only features were asked for."""
    taken: Mapping[int, Tensor]
    """What feature losses take of values after and between them, by tap."""


@dataclass
class Piece:
    """One forward of consecutive student blocks that share a graph.

    The graph of a stage is cut after each block that feature losses compare, and where backwards come in two halves after every
    block. The plain loop cuts its graph after the same blocks for features, so gradients add up in the same order.
    """

    halves: SplitBlock | None = None
    """Runs a backward in halves; None where it is all in the first half."""
    tracked: Sequence[Tensor] = ()
    """Its outputs that carry a graph; none for the last piece of a stage."""
    gradients: Sequence[Tensor | None] = field(default_factory=list)
    """The gradient of each, once the next piece's backward has run."""
    exit: Detached | None = None
    """Its output as the start of the graph of feature losses; None where none compare it."""


def cut_after(blocks: range, ends: Collection[int]) -> list[range]:
    """Consecutive blocks in parts, each of which ends with one of `ends`, or with the last block."""
    found = [i + 1 for i in blocks if i in ends or i == blocks[-1]]
    return [range(start, end) for start, end in zip([blocks.start, *found], found, strict=False)]


def teach(
    losses: FeatureLosses, contracts: PipelineContracts, blocks: range, value: Any, run: Callable[[range, Any], Any]
) -> Taught:
    """Run teacher blocks, and take what feature losses compare on the way."""
    taken: dict[int, Tensor] = {}
    for part in cut_after(blocks, losses.teacher_blocks):
        value = run(part, value)
        taken |= losses.taken(part[-1], value, part[-1] in contracts.teacher_copies)
    return Taught(value, taken)


def feature_losses(
    losses: FeatureLosses, block: int, exits: Sequence[Detached], taught: Sequence[Mapping[int, Tensor]], target: Any, step: int,
    factors: Callable[[Sequence[str]], Sequence[float]],
) -> dict[str, Tensor]:  # fmt: skip
    """Evaluate the feature losses of one student block, and keep the gradients of its outputs in `exits`.

    `exits` and `taught` hold the outputs and the teacher's tensors by unit. `factors` gives those of parts (see
    `Batch.factors`). Returns each part times its factor, a float64.
    """
    with at_step(step):
        parts = losses.parts(block, [exit.value for exit in exits], taught, target)
        by = factors(tuple(parts))
        weighted = [part * factor for part, factor in zip(parts.values(), by, strict=True)]
        torch.stack(weighted).sum().backward()
    return {name: part.detach().double() * factor for (name, part), factor in zip(parts.items(), by, strict=True)}


def trained_beside(task: Task, blocks: range) -> dict[str, nn.Parameter]:
    """The parameters of losses and projectors that are trained with some student blocks, by name."""
    modules = [(name, module) for name, module, block in task.beside if block in blocks]
    named = [(f"{prefix}.{name}", p) for prefix, module in modules for name, p in module.named_parameters()]
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def place_losses(task: Task, blocks: range, device: torch.device) -> None:
    """Put on `device` the losses and projectors that are evaluated with some student blocks."""
    for _, module, block in task.beside:
        if block in blocks:
            module.to(device)
