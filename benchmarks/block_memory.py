"""What each rank of blockwise training holds in memory, predicted and counted.

    .venv/bin/python benchmarks/block_memory.py [--devices 4] [--out benchmarks/results/block_memory]

Counted is every tensor that a rank's process makes while it trains and as long as it lives, by a mode of torch that sees each
operator, plus the weights of the blocks that the rank runs, which are there before. What operators need inside, and
samples that the reader has read ahead, are not in it; neither are they in the prediction. Processes may share cores: time
does not matter here. Links are taken to have the latency with which `hybrid` shares some rows and `balanced` moves blocks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from blockwise import SixAlike

from pipestill.costs import Link
from pipestill.model.blockwise.dry_run import blockwise_dry_run
from pipestill.model.blockwise.profile import measure_blocks
from pipestill.model.measure import LiveBytes
from pipestill.plan.blockwise.describe import describe
from pipestill.recipes.blockwise import BlockwiseWorkload
from pipestill.recipes.compress import Compress
from pipestill.recipes.recipe import Recipe
from pipestill.recipes.run_options import RunOptions
from pipestill.runtime.blockwise.worker import BlockwiseWorker
from pipestill.runtime.launch import launch
from pipestill.runtime.world import Processes
from pipestill.schedule.blockwise.profile import BlockProfile
from pipestill.train.data import inputs_and_targets
from pipestill.train.trainer import Trainer

BATCH = 128
PIPELINE_STRATEGIES = ("dp", "relay", "relay-dpu", "hybrid", "balanced")
WORKLOADS: dict[str, Recipe] = {"six blocks alike": SixAlike(batch_size=BATCH), "compress": Compress(batch_size=BATCH)}


def counted(name: str, devices: int) -> list[dict[str, Any]]:
    """On every rank; complete on rank 0."""
    workload = WORKLOADS[name].workload(0)
    assert isinstance(workload, BlockwiseWorkload)
    world, results = Processes(), []
    profile = world.broadcast(_profile(workload) if world.is_main else None)
    for strategy in PIPELINE_STRATEGIES:
        options = RunOptions(devices=devices, threads=1, device="cpu", strategy=strategy)
        trainer = workload.trainer(workload.task(), options, costs=profile)
        plan = trainer.engine.plan(profile, BATCH)
        with LiveBytes() as mode, weights_counted(mode, trainer, profile):
            trainer.fit(workload.loader, steps=max(6, 4 * plan.window))
        told = world.gather([mode.peak])
        if world.is_main:
            results.append({
                "strategy": strategy, "predicted_bytes": list(plan.memory_bytes), "counted_bytes": told,
                "plan": describe(plan), "window": plan.window,
            })  # fmt: skip
    return results


@contextmanager
def weights_counted(mode: LiveBytes, trainer: Trainer, profile: BlockProfile) -> Iterator[None]:
    """Counts also weights, which were there before, of the blocks that this rank holds, while it does."""
    hold, release, taught = BlockwiseWorker.hold, BlockwiseWorker.release, set[int]()

    def learnt(blocks: Sequence[int]) -> int:
        tensors = [t for block in blocks for t in trainer.task.tensors_of(block).values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def held(worker: BlockwiseWorker, teacher: Sequence[int], student: Sequence[int]) -> None:
        mode.now += learnt(student) + sum(profile.blocks[block].teacher_bytes for block in set(teacher) - taught)
        taught.update(teacher)
        hold(worker, teacher, student)

    def released(worker: BlockwiseWorker, student: Sequence[int]) -> None:
        mode.now -= learnt(student)
        release(worker, student)

    with patch.object(BlockwiseWorker, "hold", held), patch.object(BlockwiseWorker, "release", released):
        yield


def _profile(workload: BlockwiseWorkload) -> BlockProfile:
    """Of whole batches only: what few rows take does not matter here."""
    task, options = workload.task(), RunOptions(device="cpu", strategy="balanced")
    trainer = workload.trainer(task, options)
    inputs, _ = inputs_and_targets(next(iter(workload.loader)))
    measured = measure_blocks(
        task, blockwise_dry_run(task, inputs), inputs, batch=BATCH, devices=1, optimizer=trainer.make_optimizer
    )
    one_pass = sum(block.teacher(BATCH) + block.student(BATCH) for block in measured.blocks)
    return replace(measured, link=Link(latency_seconds=0.005 * one_pass))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/block_memory"))
    arguments = parser.parse_args()
    figures: dict[str, Any] = {
        "date": date.today().isoformat(), "torch": torch.__version__, "devices": arguments.devices, "workloads": {},
    }  # fmt: skip
    for name in WORKLOADS:
        figures["workloads"][name] = launch(counted, (name, arguments.devices), arguments.devices, device_type="cpu", threads=1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    arguments.out.with_suffix(".md").write_text(text(figures))
    print(text(figures))


def text(figures: dict[str, Any]) -> str:
    """Everything as Markdown."""
    devices = figures["devices"]
    parts = [
        f"Counted {figures['date']} with torch {figures['torch']}, CPU, {devices} processes, batches of {BATCH}, by "
        f"`benchmarks/block_memory.py --devices {devices}`. MiB on each rank: predicted / counted."
    ]
    for name, results in figures["workloads"].items():
        lines = [
            f"| strategy | window | {' | '.join(f'rank {rank}' for rank in range(devices))} | predicted beside counted |",
            f"|{'---|' * (devices + 3)}",
        ]
        for result in results:
            pairs = list(zip(result["predicted_bytes"], result["counted_bytes"], strict=True))
            cells = [f"{p / 2**20:.1f} / {c / 2**20:.1f}" for p, c in pairs]
            ratios = [p / c - 1 for p, c in pairs if c]
            far = f"{min(ratios):+.0%} to {max(ratios):+.0%}"
            lines.append(f"| {result['strategy']} | {result['window']} | {' | '.join(cells)} | {far} |")
        parts += [f"## {name}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
