"""The four published pairs of models, planned for 8 and 16 devices of a named kind: partition, utilisation, memory, speedups.

    python benchmarks/published.py [--device a100] [--pairs soft-target,byol] [--devices 8,16] [--jobs 1]

Nothing is trained and no such device is here: costs are computed from FLOPs and bytes (docs/published.md has the assumptions),
schedules are the ones that would run, and times are the simulator's. Data is noise, or the embedded text, in the published
form. Writes benchmarks/results/published.md and .json. A minute or two a pair and number of devices.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from pipestill.errors import PlanError
from pipestill.model.estimate import Machine
from pipestill.plan.search import search_pipelines
from pipestill.recipes import find
from pipestill.recipes.estimate import compute
from pipestill.recipes.run_options import RunOptions

RESULTS = Path(__file__).parent / "results"
PAIRS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "soft-target": ("ViT-L -> ResNet-152", "soft-target", {"preset": "imagenet", "data": "noise"}),
    "distilbert": ("BERT-large -> DistilBERT-large", "distilbert", {"preset": "bert-large"}),
    "byol": ("BYOL, ResNet-50", "byol", {"preset": "imagenet100", "data": "noise", "network": "resnet50"}),
    "moco-v3": ("MoCo v3, ViT-L", "moco-v3", {"preset": "imagenet", "data": "noise", "model": "vit-l"}),
}
"""Title, recipe and options."""

PUBLISHED = {"soft-target": {8: "4.68"}}
UP_TO = {8: "up to 6.42", 16: "up to 12.15"}
"""TSPipe's speedup over sequential (Lim et al., ICML 2022), on its own GPUs; for most models only the best is told."""

BASELINES = ("sequential", "1f1b", "tspipe")


def figures_of(pair: str, devices: int, device: str) -> dict[str, Any]:
    """Plan one pair for so many devices."""
    torch.set_num_threads(1)
    title, name, options = PAIRS[pair]
    recipe = find(name).load()(**options)
    workload, started = recipe.workload(0), time.perf_counter()
    machine = Machine.parse(device)
    costs, task = compute(workload, machine, RunOptions(microbatches=devices))
    computed = time.perf_counter()
    demands = task.demands
    try:
        found = search_pipelines(costs, demands, devices=devices, microbatches=devices, staleness=1 if demands.momentum else None)
    except PlanError as error:
        return {"pair": pair, "title": title, "devices": devices, "refused": str(error), "costs": costs.source}
    planned = time.perf_counter()
    steps = {one.name: one.plan.prediction.seconds_per_step for one in found.considered if one.plan is not None}
    exact = {one.name: steps[one.name] for one in found.considered if one.plan is not None and not one.plan.proof.staleness}
    plan, one = found.plan, costs.seconds_of_step(devices, demands.teacher_views)
    return {
        "pair": pair, "title": title, "devices": devices, "batch": workload.train_loader.batch_size, "rows": costs.rows,
        "microbatches": devices, "chosen": found.chosen.name, "staleness": plan.proof.staleness,
        "student_partition": list(plan.student_partition), "teacher_partition": list(plan.teacher_partition),
        "seconds_per_step": plan.prediction.seconds_per_step, "utilisation": plan.prediction.utilisation,
        "limit_seconds_per_step": plan.limit_seconds_per_step, "one_device_seconds_per_step": one,
        "memory_bytes": list(plan.memory_bytes), "fits": max(plan.memory_bytes) <= machine.device.memory_bytes,
        "steps": steps, "best_exact": min(exact, key=exact.__getitem__),
        "costs": costs.source, "computing_seconds": computed - started, "planning_seconds": planned - computed,
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| models | devices | chosen | ms a step | utilisation | memory a device, GB | over sequential | over 1f1b | "
        "over tspipe | TSPipe's paper, over sequential |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if "refused" in r:
            lines.append(f"| {r['title']} | {r['devices']} | none: {r['refused']} |" + " |" * 7)
            continue
        over = [f"{r['steps'][name] / r['seconds_per_step']:.2f}" if name in r["steps"] else "-" for name in BASELINES]
        held = [size / 1e9 for size in r["memory_bytes"]]
        paper = PUBLISHED.get(r["pair"], {} if r["pair"] == "soft-target" else UP_TO).get(r["devices"], "not told")
        lines.append(
            f"| {r['title']} | {r['devices']} | {r['chosen']} | {r['seconds_per_step'] * 1e3:.1f} | {r['utilisation']:.1%} | "
            f"{min(held):.2f} to {max(held):.2f} | {' | '.join(over)} | {paper} |"
        )
    return "\n".join(lines)


def partitions(results: list[dict[str, Any]]) -> str:
    lines = ["| models | devices | microbatches | student blocks of each stage | teacher blocks | best exact | planned in |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in (r for r in results if "refused" not in r):
        student, teacher = (" ".join(map(str, r[f"{role}_partition"])) for role in ("student", "teacher"))
        best = r["best_exact"]
        lines.append(
            f"| {r['title']} | {r['devices']} | {r['microbatches']} of {r['rows']} rows | {student} | {teacher} | "
            f"{best}, {r['steps'][best] * 1e3:.1f} ms | {r['planning_seconds']:.0f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="a100")
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("--devices", default="8,16")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    cases = [(pair, int(n), given.device) for pair in given.pairs.split(",") for n in given.devices.split(",")]
    results = []
    with ProcessPoolExecutor(given.jobs) as pool:
        for result in pool.map(figures_of, *zip(*cases, strict=True)):
            print(f"{result['title']} on {result['devices']}: {result.get('chosen', 'refused')}", flush=True)
            results.append(result)
            write(results)


def write(new: list[dict[str, Any]]) -> None:
    """The results so far, beside those of an earlier run for the same kind of device."""
    path = RESULTS / "published.json"
    before = json.loads(path.read_text())["results"] if path.exists() else []
    done = {(r["pair"], r["devices"]): r for r in (*before, *new) if r["costs"] == new[0]["costs"]}
    results = [done[key] for key in sorted(done, key=lambda key: (list(PAIRS).index(key[0]), key[1]))]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    day = datetime.now(timezone.utc).date().isoformat()
    text = (
        f"# The published pairs, planned\n\nMade by benchmarks/published.py on {day} ({machine}); no device of that kind took "
        f"part.\nCosts are {results[0]['costs']}.\nA batch is cut into as many microbatches as there are devices. Utilisation "
        "and times are the simulator's, of the steady state; speedups are over the other strategies on as many devices.\n"
        "The fastest plans of a frozen teacher were cut in a few other ways too, the slower ones not.\n\n"
        f"{table(results)}\n\n{partitions(results)}\n"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "published.md").write_text(text)
    path.write_text(json.dumps({"machine": machine, "date": day, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
