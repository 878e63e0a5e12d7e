"""The table of Pipe-BD: strategies of blockwise training x workloads, on virtual devices and on real processes.

    .venv/bin/python benchmarks/blockwise.py [--rounds 3] [--profiles ../shared/profiles] [--out benchmarks/results/blockwise]

Virtual: four devices that wait for as long as the profiles say (one CSV a workload; the paper's four), links of 10 GB/s
and 20 microseconds, batches of 256 rows. Real: two processes, one thread each, train the six blocks of recipe `compress`,
beside what two independent processes doing all the work once reach. Writes OUT.md, OUT.json and a picture of every
workload's schedules, OUT_NAME.png.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pipestill import draw
from pipestill.block_compare import compare_blocks
from pipestill.block_profile import BlockProfile
from pipestill.compare import Comparison
from pipestill.plan.blockwise import BLOCK_STRATEGIES, plan_blocks
from pipestill.plan.stages import dp_seconds
from pipestill.recipes.compress import Compress
from pipestill.recipes.run_options import RunOptions
from pipestill.virtual_block_compare import VirtualBlockOptions, compare_virtual_blocks

WORKLOADS = ("nas-cifar", "nas-imagenet", "compress-cifar", "compress-imagenet")
PUBLISHED = {  # of Pipe-BD on four GPUs, over dp: ls, relay, relay-dpu, hybrid (PAPERS.md, section 2.4)
    "nas-cifar": (1.93, 2.41, 3.08, 3.08),
    "nas-imagenet": (0.50, 3.03, 3.14, 4.37),
    "compress-cifar": (2.04, 5.63, 5.84, 7.39),
    "compress-imagenet": (0.50, 3.98, 4.23, 7.57),
}
DEVICES, BATCH = 4, 256
REAL = Compress(batch_size=128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="batches of each measurement")
    parser.add_argument("--profiles", type=Path, default=Path("../shared/profiles"))
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
        measured = compare_blocks(
            REAL, options, list(BLOCK_STRATEGIES), rounds=arguments.rounds, steps=arguments.steps, device_type="cpu"
        )
        picture(measured, arguments.out, "real")
        figures["real"] = {"where": where, **measured.figures}
    file.write_text(json.dumps(figures, indent=2) + "\n")
    arguments.out.with_suffix(".md").write_text(text(figures))
    print(text(figures))


def virtual(name: str, profile: BlockProfile, arguments: argparse.Namespace) -> dict[str, Any]:
    """One workload on virtual devices, with what the cost model of the paper says."""
    options = VirtualBlockOptions(DEVICES, BATCH, list(BLOCK_STRATEGIES), arguments.rounds, arguments.steps)
    measured = compare_virtual_blocks(profile, options)
    picture(measured, arguments.out, name)
    hybrid = plan_blocks(profile, strategy="hybrid", devices=DEVICES, batch=BATCH).chosen
    assert hybrid is not None
    return {**measured.figures, "cost_model": dp_seconds(profile, BATCH, DEVICES) / hybrid.seconds}


def picture(measured: Comparison, out: Path, name: str) -> None:
    """All timelines, one above the other."""
    traces = {n: t for n, t in measured.traces.items() if n not in ("dp", "ls")}  # of these it would show one phase
    draw.picture(list(traces.values()), out.with_name(f"{out.name}_{name}.png"), titles=list(traces))


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
        else:
            ceiling = figures[kind]["calibration"]
            low, high = ceiling["ceiling_spread"]
            parts += [
                "## compress on digits, 2 processes",
                f"One pass of all work takes {ceiling['alone_seconds_per_step'] * 1e3:.1f} ms a batch alone and "
                f"{ceiling['together_seconds_per_step'] * 1e3:.1f} ms in two processes at once: the ceiling is "
                f"{ceiling['ceiling']:.3f} ({low:.3f} to {high:.3f}).",
                table(figures[kind]["results"]),
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
