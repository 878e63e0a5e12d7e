"""Two real CPU processes, one thread each: our strategies and torch's pipelines beside the machine's own ceiling.

    .venv/bin/python benchmarks/two_devices.py [--workload soft-target|byol] [--rounds 5] [--steps 20]
        [--out benchmarks/results/two_devices]

A digits workload wide enough that every microbatch action takes 5 ms or more: soft-target distillation, or BYOL (two views
and a momentum teacher, which torch's pipelines do not have; OUT is two_devices_byol then). Each round measures, in turn:
the plain loop in one process alone; the plain loop in two independent processes at once (twice the work: the machine's
ceiling); and each strategy. Then the same for one device: what a schedule costs over the plain loop. Writes OUT.md and
OUT.json.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pipestill.compare.figures import Comparison
from pipestill.compare.real import compare
from pipestill.recipes.byol import Byol
from pipestill.recipes.recipe import Recipe
from pipestill.recipes.run_options import RunOptions
from pipestill.recipes.soft_target import SoftTarget

ONE = ("reference", "fill")


@dataclass(frozen=True)
class Case:
    """A workload, the strategies for two devices, what the command adds to choose it, and what its text says first."""

    recipe: Recipe
    two: tuple[str, ...]
    option: str = ""
    about: str = ""


CASES = {
    "soft-target": Case(
        SoftTarget(
            teacher_width=96, teacher_depth=6, student_width=96, student_depth=6, batch_size=128, optimizer="sgd", lr=0.01
        ),
        ("sequential", "gpipe", "1f1b", "fill", "torch-gpipe", "torch-1f1b"),
    ),
    "byol": Case(
        Byol(width=128, depth=6, projection=128, hidden=512, batch_size=64, optimizer="sgd", lr=0.01),
        ("sequential", "gpipe", "1f1b", "tspipe", "fill", "fill+split", "fill+stale"),
        " --workload byol",
        """
BYOL: two views of each sample, a momentum teacher as large as the student, one loss a microbatch. `tspipe` and `fill+stale`
read a teacher that is one step old; the others compute what the plain loop computes. torch's pipelines have no
momentum teacher.
""",
    ),
}  # fmt: skip


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
    parser.add_argument("--workload", choices=tuple(CASES), default="soft-target")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/two_devices, or two_devices_byol")
    arguments = parser.parse_args()
    case = CASES[arguments.workload]
    name = "two_devices" if arguments.workload == "soft-target" else f"two_devices_{arguments.workload}"
    out = arguments.out or Path("benchmarks/results") / name
    options = RunOptions(devices=2, microbatches=arguments.microbatches, threads=1, device="cpu")
    two, one = (
        compare(case.recipe, replace(options, devices=devices), names, rounds=arguments.rounds, steps=arguments.steps)
        for devices, names in ((2, case.two), (1, ONE))
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
`benchmarks/two_devices.py{case.option} --rounds {arguments.rounds} --steps {arguments.steps}`.
Ranges are the least and the largest of the rounds.
{case.about}
Plain loop: {calibration["alone_seconds_per_step"] * 1e3:.1f} ms a step alone,
{calibration["together_seconds_per_step"] * 1e3:.1f} ms in two processes at once:
the ceiling is {calibration["ceiling"]:.3f} ({low:.3f} to {high:.3f}).

Two devices; speedups over `sequential`:

{rows(two)}

One device; speedups over `reference`, the plain loop:

{rows(one)}
"""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
