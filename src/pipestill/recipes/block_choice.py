"""Which candidate each block of an assembled model is: scores of the candidates, and the best choice under a budget."""

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from pipestill import losses
from pipestill.model.nests import to_device

_TIMES = 7  # forwards of which the median counts


@dataclass(frozen=True, slots=True)
class Scored:
    """One candidate for one block, with what it costs and what it loses."""

    block: str
    candidate: str
    parameters: int
    seconds: float
    """The time of a forward on one batch, the median of several."""
    block_loss: float
    """The loss of the block's output; 0 for what is kept."""
    kl: float
    """KL(teacher, teacher with this candidate in its place), the mean over the tokens that count."""

    def cost(self, budget_of: str) -> float:
        """The candidate's part of a budget of `parameters` or `seconds`."""
        return float(getattr(self, budget_of))


@torch.no_grad()
def score(
    teacher: nn.Sequential,
    library: Sequence[tuple[int, str, nn.Module]],
    batches: Iterable[Any],
    block_loss: Callable[[Any, Any], torch.Tensor],
    device: torch.device,
) -> list[Scored]:
    """Score every candidate in the teacher, all others of its parts kept; the teacher runs once for each batch.

    Args:
        teacher: the whole teacher, in parts
        library: for each candidate the number of its part in the teacher, its name and its module
        batches: batches of (inputs, targets)
        block_loss: the loss of a block
        device: where this is computed
    """
    parts, names = list(teacher), [name for name, _ in teacher.named_children()]
    modules = [*parts, *(module for _, _, module in library)]
    for module in modules:
        module.to(device).eval()
    divergence = losses.ForwardKL()
    totals = [[0.0, 0.0] for _ in library]
    counted, seen, seconds = 0.0, 0, list[list[float]]()
    for inputs, target in batches:
        inputs, target = to_device((inputs, target), device)
        values = [inputs]
        for part in parts:
            values.append(part(values[-1]))
        count = divergence.counts(target)["forward_kl"]
        if not seconds:
            seconds = [_times(module, values[place]) for place, _, module in library]
        for (place, _, module), total in zip(library, totals, strict=True):
            value = module(values[place])
            total[0] += float(block_loss(value, values[place + 1]))
            for part in parts[place + 1 :]:
                value = part(value)
            total[1] += float(divergence.sums(value, values[-1], target)["forward_kl"])
        counted, seen = counted + count, seen + 1
    for module in modules:
        module.to("cpu")
    return [
        Scored(
            names[place], name, sum(p.numel() for p in module.parameters()), statistics.median(times),
            total[0] / max(1, seen), max(0.0, total[1] / max(1.0, counted)),
        )
        for (place, name, module), total, times in zip(library, totals, seconds, strict=True)
    ]  # fmt: skip


def _times(module: nn.Module, value: Any) -> list[float]:
    """The seconds of some forwards."""
    times = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        module(copy.copy(value))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def choose(options: Sequence[Sequence[tuple[float, float]]], budget: float) -> list[int] | None:
    """Choose one option for each block such that the costs add up to at most `budget` and the losses to the least.

    The choice is exact, as long as losses add up: only those beginnings are dropped that cost no less than another one and lose
    no less. It is the knapsack of Puzzle (Bercovich et al. 2024, section 4), by parameters or by time.

    Args:
        options: for each block, the (cost, loss) of its options
        budget: most that all may cost together

    Returns:
        the number of the option of each block; None where even the cheapest ones cost more
    """
    front: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for several in options:
        grown = sorted(
            (cost + more, loss + worse, (*picked, i)) for cost, loss, picked in front for i, (more, worse) in enumerate(several)
        )
        front, best = [], float("inf")
        for cost, loss, picked in grown:
            if cost <= budget and loss < best:
                front.append((cost, loss, picked))
                best = loss
    return list(min(front, key=lambda found: (found[1], found[0]))[2]) if front else None


def choose_scored(table: Sequence[Scored], budget: float, budget_of: str) -> tuple[list[Scored], float]:
    """Choose for each block, where `budget` is a fraction of what keeping all costs, and KEEP is the first of each block.

    Where even the cheapest ones cost more, these are chosen. Returns the choice, and its cost as a fraction.
    """
    blocks: dict[str, list[Scored]] = {}
    for one in table:
        blocks.setdefault(one.block, []).append(one)
    whole = sum(several[0].cost(budget_of) for several in blocks.values())
    options = [[(one.cost(budget_of), one.kl) for one in several] for several in blocks.values()]
    picked = choose(options, budget * whole)
    if picked is None:
        picked = [min(range(len(several)), key=lambda i: several[i]) for several in options]
    chosen = [several[i] for several, i in zip(blocks.values(), picked, strict=True)]
    return chosen, sum(one.cost(budget_of) for one in chosen) / whole if whole else 1.0


def rows_of_table(table: Sequence[Scored], chosen: Sequence[Scored]) -> list[dict[str, Any]]:
    """The table for summary.json, with what was chosen."""
    return [{**asdict(one), "chosen": any(one is other for other in chosen)} for one in table]
