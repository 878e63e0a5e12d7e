"""Two real CPU processes, one thread each: our strategies and torch's pipelines beside the machine's own ceiling.

    .venv/bin/python benchmarks/two_devices.py [--rounds 5] [--steps 20] [--out benchmarks/results/two_devices]

A digits workload wide enough that every microbatch action takes 5 ms or more. Each round measures, in turn: the
plain loop in one process alone; the plain loop in two independent processes at once (twice the work: the machine's
ceiling); and each strategy. Then the same for one device: what a schedule costs over the plain loop. Writes OUT.md and
OUT.json.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pipestill.compare import Comparison, compare
from pipestill.recipes.run import RunOptions
from pipestill.recipes.soft_target import SoftTarget

WORKLOAD = SoftTarget(
    teacher_width=96, teacher_depth=6, student_width=96, student_depth=6, batch_size=64, optimizer="sgd", lr=0.01
)
TWO = ("sequential", "gpipe", "1f1b", "fill", "torch-gpipe", "torch-1f1b")
ONE = ("reference", "fill")


def rows(comparison: Comparison) -> str:
    """The results as a Markdown table."""
    lines = [
        "| strategy | ms a step | predicted | speedup | speedup / ceiling | share of the ceiling | utilisation |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in comparison.figures["results"]:
        milliseconds, (low, high) = r["seconds_per_step"] * 1e3, (s * 1e3 for s in r["seconds_per_step_spread"])
        predicted = r["predicted_seconds_per_step"] * 1e3 if "predicted_seconds_per_step" in r else None
        cells = [
            r["strategy"],
            f"{milliseconds:.1f} ({low:.1f} to {high:.1f})",
            f"{predicted:.1f} ({predicted / milliseconds - 1:+.1%})" if predicted else "",
            f"{r['speedup']:.3f} ({r['speedup_spread'][0]:.3f} to {r['speedup_spread'][1]:.3f})",
            f"{r['speedup_share_of_ceiling']:.1%}",
            f"{r['share_of_ceiling']:.1%}",
            f"{r['utilisation']:.1%}" if "utilisation" in r else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/two_devices"))
    arguments = parser.parse_args()
    how = {"rounds": arguments.rounds, "steps": arguments.steps, "device_type": "cpu"}
    options = RunOptions(devices=2, microbatches=arguments.microbatches, threads=1, device="cpu")
    two = compare(WORKLOAD, options, TWO, **how)
    one = compare(
        WORKLOAD, RunOptions(devices=1, microbatches=arguments.microbatches, threads=1, device="cpu"), ONE, **how
    )
    calibration = two.figures["calibration"]
    where = {
        "date": date.today().isoformat(), "machine": f"{platform.processor() or platform.machine()}, 2 processes",
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    figures: dict[str, Any] = {"where": where, "two_devices": two.figures, "one_device": one.figures}
    low, high = calibration["ceiling_spread"]
    text = f"""\
Measured {where["date"]} on {where["machine"]}, torch {where["torch"]}, by
`benchmarks/two_devices.py --rounds {arguments.rounds} --steps {arguments.steps}`.
Ranges are the least and the largest of the rounds.

Plain loop: {calibration["alone_seconds_per_step"] * 1e3:.1f} ms a step alone,
{calibration["together_seconds_per_step"] * 1e3:.1f} ms in two processes at once:
the ceiling is {calibration["ceiling"]:.3f} ({low:.3f} to {high:.3f}).

Two devices; speedups over `sequential`:

{rows(two)}

One device; speedups over `reference`, the plain loop:

{rows(one)}
"""
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
