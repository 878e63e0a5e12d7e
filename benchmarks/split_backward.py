"""What a backward in two halves costs over a whole one, layer by layer, and what it buys in a schedule.

    .venv/bin/python benchmarks/split_backward.py [--rounds 9] [--repeats 16] [--out benchmarks/results/split_backward]

One process with one thread, whose own CPU time is counted, so that what else runs disturbs less. For every kind of layer:
seconds of the whole backward, and of the two halves of `model/split.py`, in turn `repeats` times a round; a round's figure
is the median of them. Gradients of weights add up, as they do in training. A layer whose halves do not give the same
gradients bit by bit, or that cannot be split, is said so. Then the prediction for `fill` on stages that each hold one conv
stack or one transformer layer, with the seconds just measured, overhead included: whole backwards against split ones,
for frozen and momentum (EMA) teachers on 4 and 8 devices. Writes OUT.md and OUT.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.costs import Costs
from pipestill.model.boundary import SplitBlock, detached, start_of, why_whole
from pipestill.plan import make_plan
from pipestill.recipes.soft_target import Convolution
from pipestill.schedule.pipeline.structure import Demands

SCHEDULED = ("conv/BN/ReLU stack", "transformer layer")
DEVICES = (4, 8)  # with twice as many microbatches
PARTS = ("forward", "whole", "input", "weight")


class Attention(nn.Module):
    """Self-attention of 4 heads: (rows, length, 256) -> the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(256, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Layer:
    """A module and an input of it, large enough for a backward of some milliseconds."""

    module: nn.Module
    value: Tensor


def layers() -> dict[str, Layer]:
    """Every kind that is measured."""
    torch.manual_seed(0)
    tokens = torch.randn(8, 128, 256, requires_grad=True)
    return {
        "Linear": Layer(nn.Linear(768, 768), torch.randn(512, 768, requires_grad=True)),
        "Conv2d": Layer(nn.Conv2d(64, 64, 3, padding=1), torch.randn(16, 64, 16, 16, requires_grad=True)),
        "LayerNorm": Layer(nn.LayerNorm(512), torch.randn(32, 128, 512, requires_grad=True)),
        "BatchNorm2d": Layer(nn.BatchNorm2d(64), torch.randn(32, 64, 28, 28, requires_grad=True)),
        "attention": Layer(Attention(), tokens),
        "Embedding": Layer(nn.Embedding(10_000, 256), torch.randint(0, 10_000, (32, 128))),
        SCHEDULED[0]: Layer(
            nn.Sequential(*(Convolution(64, 64, 1, 0.0) for _ in range(3))), torch.randn(16, 64, 16, 16, requires_grad=True)
        ),
        SCHEDULED[1]: Layer(nn.TransformerEncoderLayer(256, 4, 512, dropout=0.0, batch_first=True), tokens),
    }


def seconds_of(run: Callable[[], Any]) -> tuple[float, Any]:
    """How long this thread computed, and what it gave: on CPU, autograd works in the thread that calls it."""
    start = time.thread_time()
    given = run()
    return time.thread_time() - start, given


def once(layer: Layer, gradient: Tensor, split: bool) -> dict[str, float]:
    """Seconds of one forward and its backward, whole or in halves."""
    entered, _, _ = detached(layer.value)
    start = start_of([entered] if entered.requires_grad else [])
    forward, output = seconds_of(lambda: layer.module(entered))
    if not split:
        whole, _ = seconds_of(lambda: torch.autograd.backward([output], [gradient]))
        return {"forward": forward, "whole": whole}
    halves = SplitBlock(start)
    first, _ = seconds_of(lambda: halves.input_half([(output, gradient)]))
    second, _ = seconds_of(halves.weight_half)
    return {"forward": forward, "input": first, "weight": second}


def measure(layer: Layer, gradient: Tensor, repeats: int) -> dict[str, float]:
    """One round of one layer: the median seconds of each part, whole and split in turn."""
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    for repeat in range(2 * repeats):  # whole, split, split, whole: neither always finds what the other leaves
        for part, taken in once(layer, gradient, split=repeat % 4 in (1, 2)).items():
            seconds[part].append(taken)
    return {part: median(taken) for part, taken in seconds.items()}


def spread(values: list[float]) -> tuple[float, list[float]]:
    """The median, and the least and the largest."""
    return median(values), [min(values), max(values)]


def figures_of(name: str, rounds: list[dict[str, float]], whole: str | None) -> dict[str, Any]:
    """One layer's record; ratios are of parts of the same round."""
    record: dict[str, Any] = {"layer": name, "stays_whole": whole}
    for part in PARTS:
        record[f"{part}_seconds"], record[f"{part}_seconds_spread"] = spread([r[part] for r in rounds])
    halves = [r["input"] + r["weight"] for r in rounds]
    record["overhead"], record["overhead_spread"] = spread(
        [both / r["whole"] - 1 for both, r in zip(halves, rounds, strict=True)]
    )
    record["weight_share"], record["weight_share_spread"] = spread(
        [r["weight"] / both for both, r in zip(halves, rounds, strict=True)]
    )
    return record


def predict(record: dict[str, Any], momentum: bool, devices: int) -> dict[str, Any]:
    """`fill` on `devices` stages like this layer and a teacher like the student: whole backwards, and split ones.

    Split ones take their measured overhead with them.
    """
    forward, whole = record["forward_seconds"], record["whole_seconds"]
    both = whole * (1 + record["overhead"])
    figures: dict[str, Any] = {
        "layer": record["layer"], "teacher": "EMA" if momentum else "frozen", "devices": devices,
        "microbatches": 2 * devices,
    }  # fmt: skip
    for name, backward, share in (("whole", whole, 0.0), ("split", both, record["weight_share"])):
        plan = make_plan(
            Costs.uniform(devices, forward, forward, backward, weight=backward * share), devices=devices, strategy="fill",
            microbatches=2 * devices, split_backward=name == "split", demands=Demands(momentum=momentum),
        )  # fmt: skip
        trace = plan.prediction
        figures |= {f"{name}_seconds_per_step": trace.seconds_per_step, f"{name}_utilisation": trace.utilisation}
        figures[f"{name}_stash_peak"] = max(trace.stash_peak)
    figures["gain"] = figures["whole_seconds_per_step"] / figures["split_seconds_per_step"]
    return figures


def layer_table(records: list[dict[str, Any]]) -> str:
    """What the halves cost, as Markdown."""
    lines = [
        "| layer | whole, ms | input half, ms | weight half, ms | (input + weight) / whole | weight half's share | split |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        parts = []
        for part in PARTS[1:]:
            low, high = (s * 1e3 for s in r[f"{part}_seconds_spread"])
            parts.append(f"{r[f'{part}_seconds'] * 1e3:.2f} ({low:.2f} to {high:.2f})")
        over, (low, high) = r["overhead"], r["overhead_spread"]
        parts.append(f"{over:+.1%} ({low:+.1%} to {high:+.1%})")
        low, high = r["weight_share_spread"]
        parts.append(f"{r['weight_share']:.1%} ({low:.1%} to {high:.1%})")
        parts.append("yes, bit by bit" if r["stays_whole"] is None else f"no: {r['stays_whole']}")
        lines.append(f"| {r['layer']} | {' | '.join(parts)} |")
    return "\n".join(lines)


def schedule_table(records: list[dict[str, Any]]) -> str:
    """What the halves buy, as Markdown."""
    lines = [
        "| stages of | teacher | devices | microbatches | whole: ms a step | busy | stash | split: ms a step | busy | stash "
        "| whole / split |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        cells = [r["layer"], r["teacher"], str(r["devices"]), str(r["microbatches"])]
        for name in ("whole", "split"):
            cells += [f"{r[f'{name}_seconds_per_step'] * 1e3:.1f}", f"{r[f'{name}_utilisation']:.1%}"]
            cells.append(str(r[f"{name}_stash_peak"]))
        cells.append(f"{r['gain']:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/split_backward"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    todo = layers()
    whole = {n: why_whole(layer.module, list(layer.module.parameters()), layer.value) for n, layer in todo.items()}
    gradients = {name: torch.randn_like(layer.module(layer.value)) for name, layer in todo.items()}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in todo}
    for number in range(arguments.rounds + 1):
        for name, layer in todo.items():
            measured = measure(layer, gradients[name], arguments.repeats)
            if number:  # the first round pays for memory from the system and for kernels that are made on demand
                rounds[name].append(measured)
    records = [figures_of(name, of_layer, whole[name]) for name, of_layer in rounds.items()]
    by_name = {record["layer"]: record for record in records}
    schedules = [
        predict(by_name[name], momentum, devices) for name in SCHEDULED for momentum in (False, True) for devices in DEVICES
    ]
    where = {
        "date": date.today().isoformat(), "machine": f"{platform.processor() or platform.machine()}, 1 thread",
        "torch": torch.__version__, "python": platform.python_version(), "load_average": os.getloadavg()[0],
    }  # fmt: skip
    text = f"""\
Measured {where["date"]} on {where["machine"]}, torch {where["torch"]}, by
`benchmarks/split_backward.py --rounds {arguments.rounds} --repeats {arguments.repeats}`.
CPU time of the one thread; medians of the rounds, and the least and the largest. The machine has {os.cpu_count()} cores;
{where["load_average"]:.1f} processes on average wanted one in the last minute, of which this was one.

{layer_table(records)}

*Split*: whether both halves together give the gradients of the whole, bit by bit. An embedding's input has no gradient, so all
of its backward can wait.

`fill`, predicted from these seconds; the teacher's stages are like the student's:

{schedule_table(schedules)}

*Busy* counts the overhead of the halves as work: what the split brings is *whole / split*.
"""
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figures = {"where": where, "layers": records, "rounds": rounds, "schedules": schedules}
    arguments.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
