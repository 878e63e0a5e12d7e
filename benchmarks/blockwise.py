"""The table of Pipe-BD: strategies of blockwise training x workloads, on virtual devices and on real processes.

    .venv/bin/python benchmarks/blockwise.py [--rounds 3] [--profiles benchmarks/profiles] [--out benchmarks/results/blockwise]

Virtual: four devices that wait for as long as the profiles say (one CSV a workload; the paper's four), links of 10 GB/s
and 20 microseconds, batches of 256 rows. Real: two processes, one thread each, train six blocks of equal work, and the six
unequal ones of recipe `compress`, beside what two independent processes doing all the work once reach. Writes OUT.md,
OUT.json and a picture of the schedules
that were chosen for every workload on virtual devices, OUT_NAME.png.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from pipestill import draw
from pipestill.compare.real import compare
from pipestill.compare.virtual import VirtualOptions, compare_virtual_blockwise
from pipestill.losses import cross_entropy
from pipestill.model.blockwise.task import Blockwise
from pipestill.plan.blockwise.cost_model import dp_seconds
from pipestill.plan.blockwise.plan import BLOCKWISE_STRATEGIES, make_blockwise_plan
from pipestill.recipes.blockwise import BlockwiseWorkload
from pipestill.recipes.compress import Compress
from pipestill.recipes.datasets import digits
from pipestill.recipes.recipe import Recipe
from pipestill.recipes.run_options import RunOptions
from pipestill.recipes.training import Training
from pipestill.schedule.blockwise.profile import BlockProfile

WORKLOADS = ("nas-cifar", "nas-imagenet", "compress-cifar", "compress-imagenet")
PUBLISHED = {  # over dp on four GPUs: ls, relay, relay-dpu, hybrid (Pipe-BD, Jang et al. 2023, bars of its evaluation and poster)
    "nas-cifar": (1.93, 2.41, 3.08, 3.08),
    "nas-imagenet": (0.50, 3.03, 3.14, 4.37),
    "compress-cifar": (2.04, 5.63, 5.84, 7.39),
    "compress-imagenet": (0.50, 3.98, 4.23, 7.57),
}
DEVICES, BATCH = 4, 256


@dataclass(frozen=True)
class SixAlike:
    """Six blocks of equal work on the digits: a teacher's of three convolutions each, a student's of one."""

    name: ClassVar[str] = "six-alike"

    width: int = 48
    batch_size: int = 64

    def workload(self, seed: int, num_samples: int | None = None) -> BlockwiseWorkload:
        """Build it."""
        train, test = digits(seed)
        seen = train if num_samples is None else Subset(train, range(num_samples))
        loader, test_loader = (DataLoader(data, self.batch_size, shuffle=True, drop_last=True) for data in (seen, test))
        training = Training(epochs=1, optimizer=torch.optim.SGD, lr=0.01)
        return BlockwiseWorkload(
            self.task, loader, test_loader, cross_entropy, {}, teacher_training=training, student_training=training,
            alone_training=training,
        )  # fmt: skip

    def task(self) -> Blockwise:
        """Fresh models, the same every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Blockwise(self._blocks(3), self._blocks(1))

    def _blocks(self, depth: int) -> nn.Sequential:
        blocks = []
        for block in range(6):
            layers: list[nn.Module] = [] if block else [nn.Conv2d(1, self.width, 1)]
            for _ in range(depth):
                layers += [nn.Conv2d(self.width, self.width, 3, padding=1), nn.ReLU()]
            blocks.append(Whole(*layers))
        return nn.Sequential(*blocks)


class Whole(nn.Sequential):
    """Layers that are one block."""


REAL: dict[str, Recipe] = {"six blocks alike": SixAlike(), "compress": Compress(batch_size=128)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="batches of each measurement")
    parser.add_argument("--profiles", type=Path, default=Path(__file__).parent / "profiles")
    parser.add_argument("--only", choices=["virtual", "real"], help="one of the two")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/blockwise"))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    file = arguments.out.with_suffix(".json")
    figures: dict[str, Any] = json.loads(file.read_text()) if arguments.only and file.exists() else {}
    how = f"benchmarks/blockwise.py --rounds {arguments.rounds} --steps {arguments.steps}"
    where = {
        "date": date.today().isoformat(), "machine": f"{platform.processor() or platform.machine()}, 2 cores",
        "torch": torch.__version__, "by": how,
    }  # fmt: skip
    if arguments.only != "real":
        figures["virtual"] = {"where": where}
        for name in WORKLOADS:
            profile = BlockProfile.load(arguments.profiles / f"{name}.csv")
            figures["virtual"][name] = virtual(name, profile, arguments)
    if arguments.only != "virtual":
        options = RunOptions(devices=2, threads=1, device="cpu")
        figures["real"] = {"where": where}
        for name, recipe in REAL.items():
            strategies = list(BLOCKWISE_STRATEGIES)
            measured = compare(recipe, options, strategies, rounds=arguments.rounds, steps=arguments.steps)
            figures["real"][name] = measured.figures
    file.write_text(json.dumps(figures, indent=2) + "\n")
    arguments.out.with_suffix(".md").write_text(text(figures))
    print(text(figures))


def virtual(name: str, profile: BlockProfile, arguments: argparse.Namespace) -> dict[str, Any]:
    """One workload on virtual devices, with what the cost model of the paper says."""
    options = VirtualOptions(DEVICES, list(BLOCKWISE_STRATEGIES), arguments.rounds, arguments.steps)
    measured = compare_virtual_blockwise(profile, options, batch=BATCH)
    picture(profile, arguments.out, name)
    hybrid = make_blockwise_plan(profile, strategy="hybrid", devices=DEVICES, batch=BATCH).chosen
    assert hybrid is not None
    return {**measured.figures, "cost_model": dp_seconds(profile, BATCH, DEVICES) / hybrid.seconds}


def picture(profile: BlockProfile, out: Path, name: str) -> None:
    """The chosen schedules as they are predicted, one above the other."""
    names = [n for n in BLOCKWISE_STRATEGIES if n not in ("dp", "ls")]  # of these it would show one phase of several
    plans = [make_blockwise_plan(profile, strategy=n, devices=DEVICES, batch=BATCH) for n in names]
    draw.picture([plan.predictions[0] for plan in plans], out.with_name(f"{out.name}_{name}.png"), titles=names)


def text(figures: dict[str, Any]) -> str:
    """Everything as Markdown."""
    parts = []
    for kind in ("virtual", "real"):
        if kind not in figures:
            continue
        where = figures[kind]["where"]
        parts.append(
            f"Measured {where['date']} on {where['machine']}, torch {where['torch']}, by `{where['by']}`. "
            "Ranges are the least and the largest of the rounds."
        )
        if kind == "virtual":
            for name in WORKLOADS:
                mine = figures[kind][name]
                published = ", ".join(f"{v:.2f}" for v in PUBLISHED[name])
                parts += [
                    f"## {name}, {DEVICES} virtual devices",
                    f"In Pipe-BD's cost model `hybrid` is {mine['cost_model']:.2f} times as fast as `dp`; its paper measured, on "
                    f"other devices, {published} for ls, relay, relay-dpu and hybrid.",
                    table(mine["results"]),
                ]
        for name in REAL if kind == "real" else ():
            ceiling = figures[kind][name]["calibration"]
            low, high = ceiling["ceiling_spread"]
            parts += [
                f"## {name}, on digits, 2 processes",
                f"One pass of all work takes {ceiling['alone_seconds_per_step'] * 1e3:.1f} ms a batch alone and "
                f"{ceiling['together_seconds_per_step'] * 1e3:.1f} ms in two processes at once: the ceiling is "
                f"{ceiling['ceiling']:.3f} ({low:.3f} to {high:.3f}).",
                table(figures[kind][name]["results"]),
            ]
    return "\n\n".join(parts) + "\n"


def table(results: list[dict[str, Any]]) -> str:
    real = any("share_of_ceiling" in result for result in results)
    columns = ["strategy", "ms a batch", "predicted", "over dp", "busy", "window", "of the ceiling" if real else "of the limit"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for r in results:
        low, high = (s * 1e3 for s in r["seconds_per_step_spread"])
        milliseconds, predicted = r["seconds_per_step"] * 1e3, r["predicted_seconds_per_step"] * 1e3
        share = r["share_of_ceiling"] if real else r["limit_seconds_per_step"] / r["seconds_per_step"]
        cells = [
            r["strategy"], f"{milliseconds:.1f} ({low:.1f} to {high:.1f})",
            f"{predicted:.1f} ({predicted / milliseconds - 1:+.1%})",
            f"{r['speedup']:.2f} ({r['speedup_spread'][0]:.2f} to {r['speedup_spread'][1]:.2f})",
            f"{r['utilisation']:.0%}", str(r["window"]), f"{share:.0%}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
