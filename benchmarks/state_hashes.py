"""Prints hashes of the losses and weights of seeded runs of every recipe and strategy: equal before and after a change, or
the change altered numbers.

    python benchmarks/state_hashes.py -o before.json                           # on one state of the code
    python benchmarks/state_hashes.py -o after.json --against before.json      # on the other; status 1 where they differ

Each line is one `pipestill train`, run by the package that PYTHONPATH or the environment names: every loss of
metrics.jsonl (those of the teacher's and the lone student's training too), and every tensor that was exported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

PIPELINES = {
    "soft-target": ["--epochs", "1", "--teacher_epochs", "1"],
    "distilbert": [
        "--epochs", "1", "--teacher_epochs", "1", "--vocab_size", "400", "--hidden_size", "32", "--heads", "2",
        "--intermediate_size", "64", "--layers", "4", "--student_layers", "2", "--max_length", "24",
    ],
    "causal-lm": [
        "--epochs", "1", "--teacher_epochs", "1", "--vocab_size", "400", "--teacher_sizes", "3,32,2,1,64", "--student_sizes",
        "2,16,2,1,32",
    ],
    "byol": ["--epochs", "1", "--warm_up_epochs", "0"],
    "moco-v3": ["--epochs", "1", "--warm_up_epochs", "0", "--depth", "3"],
    "dino": ["--epochs", "1", "--warm_up_epochs", "0"],
}  # fmt: skip
MOMENTUM = ("byol", "moco-v3", "dino")
BLOCKWISE = {
    "compress": (6, ["--epochs", "1", "--teacher_epochs", "1", "--fine_tuning_epochs", "1"]),
    "llm-blocks": (
        10,
        [
            "--epochs",
            "1",
            "--teacher_epochs",
            "1",
            "--fine_tuning_epochs",
            "1",
            "--vocab_size",
            "400",
            "--teacher_sizes",
            "4,32,2,2,64",
        ],
    ),
    "nas": (6, ["--epochs", "2", "--teacher_epochs", "1", "--fine_tuning_epochs", "1"]),
}
FEW = {"--batch_norm": "deferred", "--clip_grad_norm": "0.5"}
"""Knobs that one run of each recipe has, beside the plain ones."""


def runs() -> Iterator[tuple[str, list[str]]]:
    """(name, words after `pipestill train`) of every run."""
    for recipe, words in PIPELINES.items():
        momentum = recipe in MOMENTUM
        ways: dict[str, list[str]] = {
            "reference": ["--strategy", "reference"],
            "sequential": ["--strategy", "sequential", "--devices", "2"],
            "gpipe": ["--strategy", "gpipe", "--devices", "2"],
            "1f1b": ["--strategy", "1f1b", "--devices", "2"],
            "fill": ["--strategy", "fill", "--devices", "2"],
            "fill, one device": ["--strategy", "fill"],
            "fill+split": ["--strategy", "fill", "--devices", "2", "--split_backward"],
            "fill, clipped, deferred": ["--devices", "2", *(word for pair in FEW.items() for word in pair)],
            "reference, clipped, deferred": [
                "--strategy", "reference", *(word for pair in FEW.items() for word in pair)
            ],
            "tspipe": ["--strategy", "tspipe", "--devices", "2"],
        }  # fmt: skip
        if momentum:
            ways["reference, stale"] = ["--strategy", "reference", "--staleness", "1"]
            ways["fill+stale"] = ["--strategy", "fill", "--devices", "2", "--staleness", "1"]
            ways["async"] = ["--strategy", "async", "--devices", "2"]
        else:
            del ways["tspipe"]
        for way, more in ways.items():
            yield f"{recipe}: {way}", [recipe, *words, *more]
    for recipe, (_, words) in BLOCKWISE.items():
        for strategy in ("reference", "dp", "ls", "relay", "relay-dpu", "hybrid", "balanced"):
            devices = [] if strategy == "reference" else ["--devices", "2"]
            yield f"{recipe}: {strategy}", [recipe, *words, "--strategy", strategy, *devices]


def block_costs(num_blocks: int) -> str:
    """A CSV of equal blocks, so that every state of the code makes the same plan."""
    lines = ["block,rows,teacher_forward_seconds,student_step_seconds,input_bytes_per_row,parameter_bytes"]
    for block in range(num_blocks):
        lines += [f"{block},{rows},{0.00001 * rows},{0.00004 * rows},1000,10000" for rows in (1, 16, 32)]
    return "\n".join(lines) + "\n"


def train(words: list[str], folder: Path) -> dict[str, str]:
    """Train once; returns a hash for the losses of each part of the run, and one for each file of weights."""
    recipe, out = words[0], folder / "run"
    command = [sys.executable, "-m", "pipestill", "train", *words, "--threads", "1", "--log_every", "1", "--out", str(out)]
    if recipe in BLOCKWISE:
        costs = folder / "costs.csv"
        costs.write_text(block_costs(BLOCKWISE[recipe][0]))
        helped = subprocess.run([*command[:5], "--help"], capture_output=True, text=True, check=True)
        command += ["--profile" if "--profile" in helped.stdout else "--costs", str(costs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else str(done.returncode)}
    found = {}
    for path in sorted(out.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        timed = ("seconds", "samples_per_second", "bubble")
        kept = [{key: value for key, value in sorted(line.items()) if key not in timed} for line in lines]
        if recipe in BLOCKWISE and path.parent == out:  # ranks report their own blocks, in the order in which they end
            kept = sorted(kept, key=lambda line: json.dumps(line, sort_keys=True))
        found[str(path.relative_to(out))] = hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]
    for path in sorted(out.rglob("*.safetensors")):
        state = hashlib.sha256()
        with safe_open(path, "pt") as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_tensor(name)
                state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                state.update(tensor.contiguous().flatten().view(-1).numpy().tobytes())
        found[str(path.relative_to(out))] = state.hexdigest()[:16]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", required=True, type=Path, help="where to write the hashes, as JSON")
    parser.add_argument("--against", type=Path, help="hashes of another state, to compare with")
    parser.add_argument("--only", default="", help="only runs whose name holds this text")
    given = parser.parse_args()
    before = json.loads(given.against.read_text()) if given.against else {}
    hashes: dict[str, dict[str, str]] = {}
    different = []
    for name, words in runs():
        if given.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            hashes[name] = train(words, Path(folder))
        verdict = ""
        if given.against:
            same = hashes[name] == before.get(name)
            verdict = "equal" if same else "DIFFERENT"
            different += [] if same else [name]
        print(f"{name}: {hashes[name].get('failed') or f'{len(hashes[name])} hashes'} {verdict}", flush=True)
        given.out.write_text(json.dumps(hashes, indent=1) + "\n")
    if given.against:
        print(f"{len(hashes)} runs, {sum(map(len, hashes.values()))} hashes; different: {', '.join(different) or 'none'}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
