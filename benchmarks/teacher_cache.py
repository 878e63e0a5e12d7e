"""Size and speed of a teacher cache: bytes a token, tokens a second written and read, beside running the teacher.

    python benchmarks/teacher_cache.py [-o results/teacher_cache.md]

The teacher is a Llama of random weights, whose logits are as large as a trained one's; samples are random tokens. Writing and the
teacher alone take turns, round by round, in one process with one thread. Seconds are those of its CPU time, so that other jobs on
the machine hardly matter; waiting for the disk is not in them.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import pipestill as ps

WORDS, LENGTH, ROWS = 32_000, 256, 4
KINDS = ((16, "bfloat16"), (64, "bfloat16"), (64, "float32"), (256, "bfloat16"))


def teacher(layers: int, width: int) -> nn.Module:
    """A Llama with logits of a standard deviation of about 3."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=LENGTH, use_cache=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(3 / (0.02 * width**0.5))
    made: nn.Module = model
    return made


def samples(count: int) -> list[ps.data.Example]:
    random = torch.Generator().manual_seed(1)
    return [
        ps.data.Example(torch.randint(WORDS, (LENGTH,), generator=random), torch.ones(LENGTH, dtype=torch.bool), f"sample {i}")
        for i in range(count)
    ]


def speed(tokens: int, run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return tokens / (time.process_time() - start)


def forward(model: nn.Module, loader: DataLoader[Any]) -> None:
    with torch.no_grad():
        for inputs, _ in loader:
            model(**inputs)


def measure(model: nn.Module, count: int, rounds: int) -> dict[str, Any]:
    """Figures of every kind of cache."""
    data = samples(count)
    tokens = count * LENGTH
    collate = ps.data.PadCollator(0)
    plain: DataLoader[Any] = DataLoader(data, batch_size=ROWS, collate_fn=collate)  # type: ignore[arg-type]
    keyed = DataLoader(ps.cache.keyed(data), batch_size=ROWS, collate_fn=collate)
    forward(model, plain)
    origin = ps.cache.teacher_hash(model)
    found = []
    for k, dtype in KINDS:
        alone, writing, reading = [], [], []
        for _ in range(rounds):
            folder = Path(tempfile.mkdtemp())
            try:
                alone.append(speed(tokens, lambda: forward(model, plain)))
                writer = ps.cache.Writer(folder, origin, k=k, dtype=dtype)
                writing.append(speed(tokens, lambda w=writer: ps.cache.fill(w, model, keyed)))  # type: ignore[misc]
                cache = ps.cache.TeacherCache(folder)
                loader = DataLoader(cache.attach(data), batch_size=ROWS, collate_fn=collate)
                reading.append(speed(tokens, lambda given=loader: list(given)))  # type: ignore[misc]
                num_bytes = sum(path.stat().st_size for path in folder.iterdir())
            finally:
                shutil.rmtree(folder)
        shares = [w / a for w, a in zip(writing, alone, strict=True)]
        found.append(
            {
                "k": k, "dtype": dtype, "bytes_per_token": num_bytes / tokens, "teacher_tokens_per_second": median(alone),
                "written_tokens_per_second": median(writing), "read_tokens_per_second": median(reading),
                "written_share": [min(shares), max(shares)],
            }
        )  # fmt: skip
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "tokens": tokens, "vocabulary": WORDS, "rounds": rounds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores with a load of {os.getloadavg()[1]:.0f}, one thread",
        "torch": torch.__version__, "date": date.today().isoformat(), "caches": found,
    }  # fmt: skip


def table(figures: dict[str, Any]) -> str:
    """The figures as a page."""
    lines = [
        "# Size and speed of a teacher cache",
        "",
        f"By `benchmarks/teacher_cache.py` on {figures['date']} ({figures['machine']}, torch {figures['torch']}): a Llama of "
        f"{figures['parameters'] / 1e6:.0f} million parameters with {figures['vocabulary']:,} words, {figures['tokens']:,} "
        f"tokens, median of {figures['rounds']} rounds. In float32, all logits of a token would be {4 * figures['vocabulary']:,} "
        "bytes. Seconds are of CPU time. With writing, the range is of the share of the teacher's speed, round by round.",
        "",
        "| k | type | bytes a token | teacher alone, tokens/s | with writing | read, tokens/s | read / teacher |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in figures["caches"]:
        alone, written, read = (one[f"{name}_tokens_per_second"] for name in ("teacher", "written", "read"))
        low, high = one["written_share"]
        lines.append(
            f"| {one['k']} | {one['dtype']} | {one['bytes_per_token']:.0f} | {alone:,.0f} | {written:,.0f} "
            f"({low:.0%} to {high:.0%}) | {read:,.0f} | {read / alone:.0f} x |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(teacher(options.layers, options.width), options.samples, options.rounds)
    print(table(figures))
    if options.out:
        options.out.write_text(table(figures))
        options.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
