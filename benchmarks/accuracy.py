"""What is learnt: exact, stale and asynchronous momentum teachers side by side, and every recipe beside its baseline.

    .venv/bin/python benchmarks/accuracy.py [--only staleness|margins] [--seeds 3] [--recipes byol,moco-v3] [--epochs N]
        [--runs runs/accuracy] [--out benchmarks/results/accuracy]

Each run is `pipestill train RECIPE --devices 2 --seed SEED` in a directory of its own inside RUNS, on the recipe's embedded
data as it is when nothing else is said; one whose summary is already there is not repeated, so this can be stopped and
started again.

`staleness`: the recipe under `reference` (a plain loop), `fill` (exact), `fill` with staleness 1, `tspipe` (staleness 1, twice
the microbatches) and `async` (both models one step stale), evaluated as the recipe does, on samples with labels that training
never sees. Beside each mean over the seeds: how far it is from the reference's, as the mean of the seeds' own differences and
their standard error. Whether `fill` gave the reference's weights bit for bit is looked up in the files.

`margins`: each recipe's result beside the same network untrained, or the same student without a teacher.

Writes OUT.md and OUT.json.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from safetensors.torch import load_file

REFERENCE = "reference"
PIPELINE_STRATEGIES: dict[str, tuple[str, ...]] = {
    REFERENCE: ("--strategy", "reference", "--devices", "1"),
    "fill, exact": ("--strategy", "fill"),
    "fill, staleness 1": ("--strategy", "fill", "--staleness", "1"),
    "tspipe": ("--strategy", "tspipe"),
    "async": ("--strategy", "async"),
}
MOMENTUM = ("byol", "moco-v3")


@dataclass(frozen=True)
class Baseline:
    """What a recipe's result is compared with: two entries of its summary's `metrics`, and one metric in both."""

    result: str
    baseline: str
    metric: str
    lower_is_better: bool = False


MARGINS = {
    "soft-target": Baseline("student", "student_alone", "accuracy"),
    "distilbert": Baseline("student", "student_alone", "cross_entropy", lower_is_better=True),
    "byol": Baseline("teacher", "untrained", "knn_accuracy"),
    "moco-v3": Baseline("teacher", "untrained", "knn_accuracy"),
    "dino": Baseline("teacher", "untrained", "knn_accuracy"),
}


@dataclass(frozen=True)
class Run:
    """One training; `words` choose how."""

    recipe: str
    name: str
    words: tuple[str, ...]
    seed: int

    def directory(self, runs: Path) -> Path:
        label = "".join(letter if letter.isalnum() else "-" for letter in self.name)
        return runs / f"{self.recipe}-{label}-{self.seed}"

    def summary(self, runs: Path, timeout_seconds: float) -> dict[str, Any]:
        """Train, unless that was done before."""
        directory = self.directory(runs)
        if not (directory / "summary.json").exists():
            if directory.exists():
                shutil.rmtree(directory)  # what a run left that was stopped
            words = [sys.executable, "-m", "pipestill", "train", self.recipe]
            words += [] if "--devices" in self.words else ["--devices", "2"]
            words += [*self.words, "--seed", str(self.seed), "--threads", "1", "--out", str(directory)]
            print(" ".join(words[1:]), flush=True)
            done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_seconds)
            if done.returncode:
                raise SystemExit(f"it failed with status {done.returncode}:\n{done.stderr or done.stdout}")
        found: dict[str, Any] = json.loads((directory / "summary.json").read_text())
        return found


@dataclass(frozen=True)
class Sample:
    """Values of some seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    def show(self, scale: float = 100.0) -> str:
        """Mean, standard deviation, and the least and the largest."""
        low, high = min(self.values) * scale, max(self.values) * scale
        spread = f" +- {stdev(self.values) * scale:.2f}" if len(self.values) > 1 else ""
        return f"{self.mean * scale:.2f}{spread} ({low:.2f} to {high:.2f})"

    def over(self, other: Sample) -> Sample:
        """Seed by seed, how much more it is."""
        return Sample(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))

    def show_difference(self, scale: float = 100.0) -> str:
        """Mean and its standard error."""
        error = f" +- {stdev(self.values) / math.sqrt(len(self.values)) * scale:.2f}" if len(self.values) > 1 else ""
        return f"{self.mean * scale:+.2f}{error}"

    def to_json(self) -> dict[str, Any]:
        spread = stdev(self.values) if len(self.values) > 1 else None
        return {"values": list(self.values), "mean": self.mean, "standard_deviation": spread}


def staleness(recipe: str, seeds: range, words: Sequence[str], runs: Path, timeout: float) -> tuple[str, dict[str, Any]]:
    """One recipe under every strategy."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, choice in PIPELINE_STRATEGIES.items():
        of_seeds = [Run(recipe, name, (*choice, *words), seed) for seed in seeds]
        found[name] = [run.summary(runs, timeout) for run in of_seeds]
    metrics = list(found[REFERENCE][0]["metrics"]["teacher"])
    samples = {
        name: {metric: Sample(tuple(s["metrics"]["teacher"][metric] for s in summaries)) for metric in metrics}
        for name, summaries in found.items()
    }
    untrained = {metric: Sample(tuple(s["metrics"]["untrained"][metric] for s in found[REFERENCE])) for metric in metrics}
    same = all(_same_weights(recipe, words, seed, runs) for seed in seeds)
    head = [f"{metric} | over `reference`" for metric in metrics]
    lines = [
        f"### {recipe}\n",
        f"| strategy | {' | '.join(head)} |",
        f"|---|{'---|---|' * len(metrics)}",
        f"| untrained | {' | '.join(f'{untrained[metric].show()} | ' for metric in metrics)} |",
    ]
    for name, of_metrics in samples.items():
        cells = [
            f"{sample.show()} | {'' if name == REFERENCE else sample.over(samples[REFERENCE][metric]).show_difference()}"
            for metric, sample in of_metrics.items()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    verdict = "are" if same else "ARE NOT"
    lines.append(f"\nThe weights of `fill`, exact, {verdict} those of `reference`, bit for bit, with every seed.\n")
    figures = {name: {m: s.to_json() for m, s in of_metrics.items()} for name, of_metrics in samples.items()}
    figures["untrained"] = {metric: sample.to_json() for metric, sample in untrained.items()}
    return "\n".join(lines), {"strategies": figures, "exact_is_reference": same}


def _same_weights(recipe: str, words: Sequence[str], seed: int, runs: Path) -> bool:
    """Whether the exact pipeline's student and teacher are the plain loop's."""
    one, other = (Run(recipe, name, (*PIPELINE_STRATEGIES[name], *words), seed) for name in (REFERENCE, "fill, exact"))
    for file in ("model.safetensors", "teacher.safetensors"):
        ours, theirs = (load_file(run.directory(runs) / "export" / file) for run in (one, other))
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
            return False
    return True


def margins(recipes: Sequence[str], seeds: range, words: Sequence[str], runs: Path, timeout: float) -> tuple[str, dict[str, Any]]:
    """Every recipe beside its baseline."""
    lines = [
        "| recipe | metric | result | baseline | better by, seed by seed | least | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    figures = {}
    for recipe in recipes:
        what = MARGINS[recipe]
        name = "fill, exact" if recipe in MOMENTUM else "default"
        choice = PIPELINE_STRATEGIES["fill, exact"] if recipe in MOMENTUM else ()
        summaries = [Run(recipe, name, (*choice, *words), seed).summary(runs, timeout) for seed in seeds]
        result, baseline = (
            Sample(tuple(s["metrics"][side][what.metric] for s in summaries)) for side in (what.result, what.baseline)
        )
        margin = baseline.over(result) if what.lower_is_better else result.over(baseline)
        scale = 1.0 if what.lower_is_better else 100.0
        seconds = Sample(tuple(s["seconds"] for s in summaries))
        lines.append(
            f"| {recipe} | {what.metric} of {what.result} against {what.baseline} | {result.show(scale)} | "
            f"{baseline.show(scale)} | {margin.show_difference(scale)} | {min(margin.values) * scale:+.2f} | {seconds.mean:.0f} |"
        )
        figures[recipe] = {"result": result.to_json(), "baseline": baseline.to_json(), "margin": margin.to_json()}
    return "\n".join(lines) + "\n", figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("staleness", "margins"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipes", help="commas between names")
    parser.add_argument("--epochs", type=int, help="of the student (default: the recipe's)")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that one training may take")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accuracy"))
    chosen = parser.parse_args()
    seeds = range(chosen.seeds)
    words = ["--epochs", str(chosen.epochs)] if chosen.epochs else []
    wanted = chosen.recipes.split(",") if chosen.recipes else None
    text = [
        f"Measured {date.today()} on {platform.machine()}, torch {torch.__version__}, by\n"
        f"`benchmarks/accuracy.py --seeds {chosen.seeds}{f' --epochs {chosen.epochs}' if chosen.epochs else ''}`: "
        f"mean +- standard deviation over seeds 0 to {chosen.seeds - 1}\n(least to largest), in percent where no unit is given.\n"
    ]
    figures: dict[str, Any] = {"seeds": chosen.seeds, "epochs": chosen.epochs}
    if chosen.only != "margins":
        text.append(
            "## Exact, stale, asynchronous\n\nOf the teacher's features. The second column of each pair is the difference to "
            "`reference`, seed by seed:\nits mean and standard error.\n"
        )
        figures["staleness"] = {}
        for recipe in wanted or MOMENTUM:
            table, figures["staleness"][recipe] = staleness(recipe, seeds, words, chosen.runs, chosen.timeout)
            text.append(table)
    if chosen.only != "staleness":
        table, figures["margins"] = margins(wanted or list(MARGINS), seeds, words, chosen.runs, chosen.timeout)
        text.append(f"## Beside the baselines\n\n{table}")
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.with_suffix(".md").write_text("\n".join(text))
    chosen.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
