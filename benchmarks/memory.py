"""Peak resident memory of two processes: what the order of the student's work leaves of all forwards first.

    .venv/bin/python benchmarks/memory.py [--rounds 2] [--steps 10] [--microbatches 16] [--rows 8] [--size 64]
        [--out benchmarks/results/memory]

A convolutional student whose activations are most of the memory, and a small teacher. Each strategy of each round runs
in two processes of its own, because an allocator keeps what was freed and the next run would start with it. The peak is
the system's own high-water mark (VmHWM), from just before the first step to after the last. Beside it: the stash that the
schedule declares, the one in the trace, and its bytes, counted from what a microbatch keeps for a backward and, between
the halves of a split one, for the second. Partitions are given, so that all strategies share one and nothing is profiled.
All of it twice: with malloc as it comes, and with pages of its own for every large piece, which go back once it is freed:
what is more in the first is memory that malloc holds. Few steps would flatter: messages that were sent are kept for a while.
Writes OUT.md and OUT.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pipestill import Distillation, Trainer, launch
from pipestill.costs import BlockCosts, Costs
from pipestill.losses import SoftTarget
from pipestill.model.blocks import ranges
from pipestill.model.boundary import SplitBlock, detached, start_of
from pipestill.recipes.soft_target import CLASSES, cnn
from pipestill.runtime.record import peak_bytes, reset_peak
from pipestill.schedule import Op, Role, Trace

FIRST = "gpipe"  # all forwards first: what the others are compared with
PIPELINE_STRATEGIES: dict[str, dict[str, Any]] = {
    FIRST: {"strategy": FIRST},
    "1f1b": {"strategy": "1f1b"},
    "fill": {"strategy": "fill"},
    "fill+split": {"strategy": "fill", "split_backward": True},
    "fill, stash all": {"strategy": "fill", "stash": "all"},
}
STUDENT, TEACHER = (4, 6), (2, 2)  # blocks of each stage; the student's fifth block still has the images' full size
MALLOCS = {"heap": None, "pages": 128 * 1024}  # bytes from which a piece has its own pages; None: as malloc sees fit
M_MMAP_THRESHOLD = -3  # malloc.h
CPU, MIB = torch.device("cpu"), 2**20


def task() -> Distillation:
    """Nine convolutions, of which the last four work on halved images, and a head; the teacher has three narrow ones."""
    return Distillation(cnn(4, 2, 0.0, seed=1), cnn(16, 8, 0.0, seed=2), SoftTarget())


@dataclass(frozen=True)
class UnitBytes:
    """What one stage keeps of one microbatch: from its forward on, and between the halves of a split backward."""

    forward: int
    between: int


def unit_bytes(rows: int, size: int) -> list[UnitBytes]:
    """For each stage, counting each piece of memory once and no weights; as much as split.py needs between the halves."""
    blocks = task().student_blocks
    value: Any = torch.rand(rows, 1, size, size)
    found = []
    for stage in ranges(STUDENT):
        owned = {p.untyped_storage().data_ptr() for p in blocks.parameters_of(stage).values()}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor, owned: set[int] = owned, kept: dict[int, Tensor] = kept) -> Tensor:
            pointer = tensor.untyped_storage().data_ptr()
            if pointer not in owned:
                kept.setdefault(pointer, tensor)
            return tensor

        halves: list[tuple[SplitBlock, Any, list[Tensor | None]]] = []
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for i in stage:
                value, _, gradients = detached(value)
                start = start_of([value] if value.requires_grad else [])
                value = blocks.blocks[i].call(value)
                halves.append((SplitBlock(start), value, gradients))
        forward = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        gradient: Tensor | None = torch.randn_like(value)
        for block, output, gradients in reversed(halves):
            assert gradient is not None
            block.input_half([(output, gradient)])
            gradient = gradients[0] if gradients else None
            for tensor in (t for branch in block.branches for t in branch.arrived if t is not None):
                keep(tensor)
        found.append(UnitBytes(forward, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())))
    return found


def stash_bytes(trace: Trace, units: list[UnitBytes]) -> list[int]:
    """For each rank, the most bytes that its microbatches keep at once in `trace`."""
    held, peak = [0] * trace.num_ranks, [0] * trace.num_ranks
    for event in trace.events:
        unit, action = units[event.rank], event.action
        if action.role is Role.STUDENT:
            held[event.rank] += {
                Op.FORWARD: unit.forward, Op.BACKWARD: -unit.forward,
                Op.INPUT: unit.between - unit.forward, Op.WEIGHT: -unit.between,
            }.get(action.op, 0)  # fmt: skip
            peak[event.rank] = max(peak[event.rank], held[event.rank])
    return peak


def train(
    knobs: dict[str, Any], threshold: int | None, units: list[UnitBytes], microbatches: int, rows: int, size: int, steps: int
) -> dict[str, Any]:
    """On every rank of fresh processes; complete on rank 0."""
    if threshold is not None and not ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, threshold):
        raise OSError(f"mallopt refused an M_MMAP_THRESHOLD of {threshold}; this needs glibc")
    work = task()
    torch.manual_seed(0)
    images = torch.rand(2 * microbatches * rows, 1, size, size)
    data = TensorDataset(images, torch.randint(0, CLASSES, (len(images),)))
    costs = Costs(
        tuple(BlockCosts(b.name, 1.0, 2.0, weight_seconds=1.0) for b in work.student_blocks.blocks),
        tuple(BlockCosts(b.name, 0.2) for b in work.teacher_blocks.blocks) if work.teacher_blocks else (),
    )
    trainer = Trainer(
        work, devices=2, microbatches=microbatches, lr=0.01, costs=costs, device="cpu",
        student_partition=STUDENT, teacher_partition=TEACHER, **knobs,
    )  # fmt: skip
    reset_peak(CPU)
    before: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(before, peak_bytes(CPU))
    result = trainer.fit(DataLoader(data, batch_size=microbatches * rows), epochs=steps, steps=steps)
    if result.plan is None or result.trace is None:
        return {}
    return {
        "before_bytes": before,
        "peak_bytes": result.peak_memory_bytes,
        "stash_bound": list(result.plan.schedule.stash),
        "stash_peak": list(result.trace.stash_peak),
        "stash_bytes": stash_bytes(result.trace, units),
        "whole_backwards": list(result.whole_backwards),
    }


def figures_of(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One record for each strategy and rank. Ratios are over `FIRST` of the same round."""
    records = []
    for name, rounds in runs.items():
        for rank in range(len(STUDENT)):
            peaks = [r["peak_bytes"][rank] for r in rounds]
            ratios = [peak / first["peak_bytes"][rank] for peak, first in zip(peaks, runs[FIRST], strict=True)]
            rises = [r["peak_bytes"][rank] - r["before_bytes"][rank] for r in rounds]
            bound, stash, size = (rounds[-1][key][rank] for key in ("stash_bound", "stash_peak", "stash_bytes"))
            records.append({
                "strategy": name, "rank": rank, "stash_bound": bound, "stash_peak": stash, "stash_bytes": size,
                "peak_bytes": median(peaks), "peak_bytes_spread": [min(peaks), max(peaks)],
                "rise_bytes": median(rises), "rise_bytes_spread": [min(rises), max(rises)],
                "ratio": median(ratios), "ratio_spread": [min(ratios), max(ratios)],
                "stash_is_bound": all(r["stash_peak"][rank] == r["stash_bound"][rank] for r in rounds),
                "below_first": max(ratios) < 1.0,
            })  # fmt: skip
    return records


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown; MiB."""
    lines = [
        f"| strategy | rank | stash bound | in the trace | its bytes | peak RSS | above the start | peak / {FIRST}'s | below |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        judged = "" if r["strategy"] == FIRST else "pass" if r["below_first"] else "FAIL"
        cells = [
            r["strategy"], str(r["rank"]), str(r["stash_bound"]),
            f"{r['stash_peak']}{'' if r['stash_is_bound'] else ' (not the bound)'}", f"{r['stash_bytes'] / MIB:.0f}",
            ranged(r["peak_bytes"] / MIB, [b / MIB for b in r["peak_bytes_spread"]], 0),
            ranged(r["rise_bytes"] / MIB, [b / MIB for b in r["rise_bytes_spread"]], 0),
            ranged(r["ratio"], r["ratio_spread"], 3), judged if r["strategy"] != "fill, stash all" else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sizes(amounts: Iterable[int]) -> str:
    """Bytes on the ranks, in MiB."""
    return " and ".join(f"{amount / MIB:.1f}" for amount in amounts)


def ranged(middle: float, spread: list[float], digits: int) -> str:
    """A median with the least and the largest."""
    return f"{middle:.{digits}f} ({spread[0]:.{digits}f} to {spread[1]:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="enough for what piles up over steps, such as messages")
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8, help="of a microbatch")
    parser.add_argument("--size", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory"))
    arguments = parser.parse_args()
    work = (arguments.microbatches, arguments.rows, arguments.size, arguments.steps)
    units = unit_bytes(arguments.rows, arguments.size)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {malloc: {name: [] for name in PIPELINE_STRATEGIES} for malloc in MALLOCS}
    for _ in range(arguments.rounds):
        for malloc, threshold in MALLOCS.items():
            for name, knobs in PIPELINE_STRATEGIES.items():
                runs[malloc][name].append(launch(train, (knobs, threshold, units, *work), 2, threads=1))
    where = {
        "date": date.today().isoformat(), "machine": f"{platform.processor() or platform.machine()}, 2 processes",
        "torch": torch.__version__, "python": platform.python_version(), "libc": " ".join(platform.libc_ver()),
        "malloc": {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))},
    }  # fmt: skip
    records = {malloc: figures_of(of_malloc) for malloc, of_malloc in runs.items()}
    figures = {
        "where": where,
        "arguments": vars(arguments) | {"out": str(arguments.out)},
        "unit_bytes": [asdict(unit) for unit in units],
    }
    command = " ".join(f"--{name} {getattr(arguments, name)}" for name in ("rounds", "steps", "microbatches", "rows", "size"))
    text = f"""\
Measured {where["date"]} on {where["machine"]}, torch {where["torch"]}, {where["libc"]}, malloc
{where["malloc"] or "as it comes"}, by `benchmarks/memory.py {command}`.
Medians of the rounds, and the least and the largest; MiB. Each run has two processes of its own.

A microbatch keeps {sizes(u.forward for u in units)} MiB on the two ranks for its backward. Between the halves of a split one
it keeps {sizes(u.between for u in units)} MiB: the gradients that the second half needs, too.

malloc as it comes:

{table(records["heap"])}

Every piece of 128 KiB or more in pages of its own (`M_MMAP_THRESHOLD`):

{table(records["pages"])}

*Its bytes*: the most that the microbatches in the trace keep at once. *Above the start*: the peak less what the
process held before training: temporary tensors, messages and libraries that load late are in it, too. *Below*: whether the
peak is below `{FIRST}`'s of the same round in every round. `fill, stash all` is `fill` with all forwards first (the second
rank holds two fewer), to tell the order from the rest of `fill`.
"""
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    everything = {**figures, "results": records, "runs": runs}
    arguments.out.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
