"""Memory and time of a loss over a large vocabulary: heads, cross entropy and divergence, plain and in chunks.

    .venv/bin/python benchmarks/losses_memory.py [--tokens 4096] [--words 128000] [--repeats 3] [--out FILE]

Two cases are measured, each a forward and a backward of SoftTarget(2.0, 0.5) with labels: hidden states with both models'
heads, and logits that are given. *Plain* is torch's own linear, log_softmax, kl_div and cross_entropy, kept by autograd. Each
measurement has a process of its own. Its memory is the peak of what the process holds beyond weights and inputs (which all
ways need), from the kernel's high-water mark. The ways take turns, and the median, smallest and largest of the repeats are
reported. CPU seconds are those of all threads: other programs on the machine change them less.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pipestill as ps

WIDTHS = {"teacher": 1024, "student": 512}
TEMPERATURE, WEIGHT = 2.0, 0.5
WAYS = ("heads, plain", "heads, in chunks", "logits, plain", "logits, in chunks")
MIB = 2**20


def memory(field: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def plain(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    log_q, log_p = (F.log_softmax(logits / TEMPERATURE, -1) for logits in (student, teacher))
    divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return WEIGHT * TEMPERATURE**2 * divergence + F.cross_entropy(student, labels)


def in_chunks(student: Any, teacher: Any, labels: Tensor) -> Tensor:
    parts = ps.losses.SoftTarget(TEMPERATURE, WEIGHT)(student, teacher, labels)
    return parts["soft_target"] + parts["cross_entropy"]


def work(way: str, tokens: int, words: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """What a way does, and the tensors that it makes gradients of."""
    torch.manual_seed(0)
    labels = torch.randint(words, (tokens,))
    if way.startswith("logits"):
        student, teacher = torch.empty(tokens, words).normal_(0, 3).requires_grad_(), torch.empty(tokens, words).normal_(0, 3)
        loss = plain if way == "logits, plain" else in_chunks
        return lambda: loss(student, teacher, labels), [student]
    hidden = {role: torch.randn(tokens, width) for role, width in WIDTHS.items()}
    heads = {role: torch.empty(words, width).normal_(0, 3 / width**0.5) for role, width in WIDTHS.items()}
    trained = [hidden["student"].requires_grad_(), heads["student"].requires_grad_()]

    def fused() -> Tensor:
        student, teacher = (ps.losses.LinearLogits(hidden[role], heads[role]) for role in ("student", "teacher"))
        return in_chunks(student, teacher, labels)

    def whole() -> Tensor:
        with torch.no_grad():
            of_teacher = F.linear(hidden["teacher"], heads["teacher"])
        return plain(F.linear(hidden["student"], heads["student"]), of_teacher, labels)

    return whole if way == "heads, plain" else fused, trained


def measure_here(way: str, tokens: int, words: int) -> dict[str, Any]:
    """Loss, gradients' norm, seconds and bytes of one forward and backward in this process."""
    small, _ = work(way, 8, 100)
    small().backward()  # loads what the first call loads
    call, trained = work(way, tokens, words)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, start, started = memory("VmRSS"), time.perf_counter(), time.process_time()
    loss = call()
    loss.backward()
    seconds, busy, peak = time.perf_counter() - start, time.process_time() - started, memory("VmHWM") - before
    norms = [float(torch.linalg.vector_norm(tensor.grad, dtype=torch.float64)) for tensor in trained if tensor.grad is not None]
    return {"way": way, "seconds": seconds, "cpu_seconds": busy, "bytes": peak, "loss": loss.item(), "gradient_norms": norms}


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own."""
    given = ["--tokens", str(options.tokens), "--words", str(options.words), "--threads", str(options.threads), "--way", way]
    done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a way: the median and spread of seconds and bytes, and both as fractions of the plain way's."""
    lines = []
    for way in dict.fromkeys(run["way"] for run in runs):
        mine, plain_runs = ([run for run in runs if run["way"] == name] for name in (way, f"{way.partition(',')[0]}, plain"))
        line: dict[str, Any] = {"way": way, "loss": mine[0]["loss"], "gradient_norms": mine[0]["gradient_norms"]}
        for figure in ("seconds", "cpu_seconds", "bytes"):
            values = [run[figure] for run in mine]
            line[figure] = {"median": median(values), "least": min(values), "most": max(values)}
            line[f"of_plain_{figure}"] = median(values) / median([run[figure] for run in plain_runs])
        lines.append(line)
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    rows = ["| | peak MiB | of plain | seconds (least to most) | of plain | CPU seconds (least to most) | of plain |"]
    rows.append("|---|---|---|---|---|---|---|")
    for line in lines:
        cells = [line["way"], f"{line['bytes']['median'] / MIB:,.0f}", f"1/{1 / line['of_plain_bytes']:.1f}"]
        for figure in ("seconds", "cpu_seconds"):
            times = line[figure]
            cells.append(f"{times['median']:.1f} ({times['least']:.1f} to {times['most']:.1f})")
            cells.append(f"{line[f'of_plain_{figure}']:.2f}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--words", type=int, default=128_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=("heads", "logits"), help="one of the two cases (default: both)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.way:
        print(json.dumps(measure_here(options.way, options.tokens, options.words)))
        return
    runs = []
    for repeat in range(options.repeats):
        for way in (way for way in WAYS if way.startswith(options.only or "")):
            runs.append(measure(way, options))
            print(
                f"{repeat + 1}/{options.repeats} {way}: {runs[-1]['cpu_seconds']:.1f} CPU s, {runs[-1]['bytes'] / MIB:,.0f} MiB",
                flush=True,
            )
    lines = summary(runs)
    print(table(lines))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        found = {"date": str(date.today()), "torch": torch.__version__, "tokens": options.tokens, "words": options.words}
        found |= {"threads": options.threads, "widths": WIDTHS, "runs": runs, "ways": lines}
        options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(f"{table(lines)}\n")


if __name__ == "__main__":
    main()
