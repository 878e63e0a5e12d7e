"""How strategies scale to 16 devices: virtual ones, whose work and links wait for as long as their costs say.

    .venv/bin/python benchmarks/scaling.py [--devices 1,2,4,8,16] [--rounds 2] [--steps 6] [--only ssl|kd]
        [--microbatches 20] [--strategies sequential,fill+split+all] [--out benchmarks/results/scaling]

Two workloads. `ssl`: equal momentum teacher and student, two views, one loss a microbatch (BYOL) and every action 20 ms long
(--milliseconds).
`kd`: one view, a frozen ViT-L and a ResNet-152, whose blocks take time by their multiply-adds (a forward of one of 8
student stages is about 20 ms). Links have 50 us and 10 GB/s. Speedups are over `sequential` of the same round; a trivial
pipeline, run beside them, tells what this machine's processes and messages leave of any result. Writes OUT.md, OUT.json
and OUT.png.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pipestill.compare.virtual import VirtualOptions, compare_virtual_pipelines
from pipestill.costs import BlockCosts, Costs, Link
from pipestill.schedule.pipeline.structure import Demands

LINK = Link(latency_seconds=50e-6, bytes_per_second=10e9)
SSL = ("sequential", "gpipe", "1f1b", "tspipe", "fill", "fill+stale", "fill+split", "fill+split+stale", "async")
KD = ("sequential", "gpipe", "1f1b", "tspipe", "fill", "fill+split")
PUBLISHED = {("ssl", 8): 6.42, ("ssl", 16): 12.15, ("kd", 8): 4.68}  # TSPipe, Lim et al. 2022, evaluation


def ssl(devices: int, seconds: float) -> tuple[Costs, Demands]:
    """Stages alike; every boundary carries 1 MB a microbatch and view."""
    costs = Costs.uniform(devices, seconds, seconds, 2 * seconds, weight=seconds, views=2)
    student, teacher = (
        tuple(replace(block, output_bytes=1_000_000) for block in blocks) for blocks in (costs.student, costs.teacher)
    )
    return replace(costs, student=student, teacher=teacher, link=LINK), Demands(momentum=True, views=2, teacher_views=2)


def kd(devices: int, seconds: float) -> tuple[Costs, Demands]:
    """ViT-L/16 and ResNet-152 at 224 pixels, by their multiply-adds; a microbatch of 8 images."""
    first, more, widths = 373e6, 218e6, (256, 512, 1024, 2048)
    blocks = [231e6, *[more] * 2, first, *[more] * 7, first, *[more] * 35, first, *[more] * 2]
    blocks[0] += 118e6  # with the stem
    sizes = [3136 * widths[0]] * 3 + [784 * widths[1]] * 8 + [196 * widths[2]] * 36 + [49 * widths[3]] * 3
    second = seconds * 8 / sum(blocks)  # of a multiply-add
    student = tuple(
        BlockCosts(f"block{i}", m * second, 2 * m * second, output_bytes=8 * size * 4, weight_seconds=m * second)
        for i, (m, size) in enumerate(zip(blocks, sizes, strict=True))
    )
    layer = 197 * 12 * 1024**2 + 2 * 197**2 * 1024
    teacher = tuple(BlockCosts(f"layer{i}", layer * second, output_bytes=8 * 197 * 1024 * 4) for i in range(24))
    return Costs(student, teacher, link=LINK), Demands()


def measure(
    name: str, devices: int, rounds: int, steps: int, chosen: list[str], microbatches: int | None, seconds: float
) -> dict[str, Any]:
    """One workload on so many devices."""
    costs, demands = (ssl if name == "ssl" else kd)(devices, seconds)
    microbatches = microbatches or max(4, devices if name == "ssl" else 2 * devices)
    strategies = chosen or (SSL if name == "ssl" else KD)
    options = VirtualOptions(devices, strategies, rounds, steps)
    figures = compare_virtual_pipelines(costs, demands, options, microbatches=microbatches).figures
    return {"workload": name, **figures}


def table(measured: dict[str, Any]) -> str:
    """One run as Markdown."""
    calibration, devices = measured["calibration"], measured["calibration"]["devices"]
    published = PUBLISHED.get((measured["workload"], devices))
    lines = [
        f"### {measured['workload']}, {devices} devices, {calibration['microbatches']} microbatches",
        "",
        f"A trivial pipeline reaches {calibration['share_of_ideal']:.1%} of its ideal; clocks set back "
        f"{calibration['late']:.1%}." + (f" TSPipe published {published}x." if published else ""),
        "",
        "| strategy | ms a step | predicted | speedup | busy | predicted | stash | staleness |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in measured["results"]:
        seconds, predicted = r["seconds_per_step"], r["predicted_seconds_per_step"]
        low, high = r["speedup_spread"]
        cells = [
            r["strategy"], f"{seconds * 1e3:.0f}", f"{predicted * 1e3:.0f} ({predicted / seconds - 1:+.1%})",
            f"{r['speedup']:.2f} ({low:.2f} to {high:.2f})", f"{r['utilisation']:.1%}",
            f"{r['predicted_utilisation']:.1%}", str(max(r["stash_peak"])), str(r["staleness"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Speedup over `sequential` against devices, one panel a workload."""
    names = sorted({run["workload"] for run in runs}, reverse=True)
    figure = Figure(figsize=(5.5 * len(names), 4.5), dpi=110, layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), i + 1)
        mine = [run for run in runs if run["workload"] == name]
        counts = [run["calibration"]["devices"] for run in mine]
        axes.plot(counts, counts, color="0.7", linestyle=":", label="as many times as devices")
        for j, result in enumerate(mine[0]["results"]):
            speedups = [run["results"][j]["speedup"] for run in mine]
            axes.plot(counts, speedups, marker="o", markersize=4, label=result["strategy"])
        published = [(n, s) for (w, n), s in PUBLISHED.items() if w == name and n in counts]
        if published:
            axes.plot(*zip(*published, strict=True), "kx", label="TSPipe, published")
        axes.set(title=name, xlabel="virtual devices", ylabel="speedup over sequential")
        axes.legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="1,2,4,8,16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--strategies", default="", help="default: all that the workload allows")
    parser.add_argument("--only", choices=("ssl", "kd"))
    parser.add_argument("--microbatches", type=int, help="default: as many as devices for ssl, twice as many for kd")
    parser.add_argument("--milliseconds", type=float, default=20.0, help="of an action")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling"))
    arguments = parser.parse_args()
    chosen = [strategy for strategy in arguments.strategies.split(",") if strategy]
    names = [arguments.only] if arguments.only else ["ssl", "kd"]
    runs = []
    text = (
        f"Measured {date.today().isoformat()} by `benchmarks/scaling.py`, {arguments.rounds} rounds, actions of "
        f"{arguments.milliseconds:g} ms.\n"
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        for devices in map(int, arguments.devices.split(",")):
            how = (arguments.rounds, arguments.steps, chosen, arguments.microbatches, arguments.milliseconds / 1e3)
            runs.append(measure(name, devices, *how))
            text += "\n" + table(runs[-1])
            print(table(runs[-1]), flush=True)
            arguments.out.with_suffix(".json").write_text(json.dumps(runs, indent=1) + "\n")
            arguments.out.with_suffix(".md").write_text(text)
    plot(runs, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
