"""`pipestill cache --teacher DIR --data FILE --folder DIR`: write a teacher's largest logits to disk, without training."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from pipestill.busy import Busy
from pipestill.cli.figures import say, shown_bytes
from pipestill.cli.options import parse
from pipestill.errors import ConfigError


@dataclass(frozen=True)
class CacheOptions:
    """What is written, and where.

    Args:
        teacher: directory or hub name of a causal language model
        data: a file of JSON lines, a text file, a folder of .txt files, or a dataset saved with save_to_disk
        folder: the cache's folder; one that is there is added to
        tokenizer: directory or hub name of a tokenizer (default: the teacher's)
        k: how many logits are kept of each token, the largest
        dtype: the type in which they are kept
        temperature: the temperature of the loss that will read them
        max_length: most tokens of an example (default: no limit)
        truncate: what is done with longer ones
        answers: which answers of chats count; those in which nothing counts are left out
        vocabulary: read only the first so many logits of the teacher (default: all)
        batch_size: examples that the teacher sees at a time
        device: where the teacher runs
        json: print the figures as one JSON object
    """

    teacher: str | None = None
    data: str | None = None
    folder: str | None = None
    tokenizer: str | None = None
    k: int = 64
    dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16"
    temperature: float = 1.0
    max_length: int | None = None
    truncate: Literal["refuse", "end", "start", "split", "drop"] = "refuse"
    answers: Literal["all", "last"] = "all"
    vocabulary: int | None = None
    batch_size: int = 8
    device: Literal["cpu", "cuda"] = "cpu"
    json: bool = False


def run(words: list[str]) -> int:
    """Run the command."""
    (options,) = parse("cache", words, CacheOptions)
    if missing := [f"--{name}" for name in ("teacher", "data", "folder") if getattr(options, name) is None]:
        raise ConfigError(f"'cache' needs {', '.join(missing)}; 'pipestill cache --help' explains them")
    if options.batch_size < 1:
        raise ConfigError(f"batch_size is {options.batch_size}; expected at least 1")
    figures = _write(options)
    if options.json:
        print(json.dumps(figures))
        return 0
    console = Console()
    for line in figures["data"].splitlines():
        say(console, line)
    speed = f"{figures['tokens_per_second']:,.0f} tokens/s"
    say(
        console,
        f"{figures['written']:,} samples written to '{options.folder}', which now has {figures['samples']:,}: "
        f"{figures['tokens']:,} tokens, {shown_bytes(figures['bytes'])}, {figures['bytes_per_token']:.0f} bytes a token; {speed}",
    )
    return 0


def _write(options: CacheOptions) -> dict[str, Any]:
    """Run the teacher over the data; returns the figures."""
    from torch.utils.data import DataLoader

    from pipestill import cache, data
    from pipestill.recipes.language import from_pretrained

    assert options.teacher and options.data and options.folder
    with Busy("loading the teacher") as busy:
        tokenizer = from_pretrained("AutoTokenizer", options.tokenizer or options.teacher, "tokenizer")
        busy.change("reading the data")
        make = data.Tokenization(tokenizer, max_length=options.max_length, truncate=options.truncate, answers=options.answers)
        examples = data.tokenize(data.open_records(options.data), make)
        teacher = from_pretrained("AutoModelForCausalLM", options.teacher, "teacher")
        pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        sampler = data.LengthSampler(examples.lengths(), options.batch_size)
        loader = DataLoader(
            cache.keyed(examples), batch_size=options.batch_size, sampler=sampler, collate_fn=data.PadCollator(pad)
        )
        tokens = 0

        def done(_: int, more: int) -> None:
            nonlocal tokens
            tokens += more
            busy.change(f"{tokens:,} of {examples.counts.num_tokens:,} tokens")

        writer = cache.Writer(
            options.folder, teacher, tokenizer, k=options.k, dtype=options.dtype, temperatures=(options.temperature,),
            vocabulary=options.vocabulary,
        )  # fmt: skip
        start = time.perf_counter()
        written = cache.fill(writer, teacher, loader, device=options.device, done=done)
        seconds = time.perf_counter() - start
    found = cache.TeacherCache(options.folder)
    num_bytes = sum(path.stat().st_size for path in Path(options.folder).iterdir())
    return {
        "written": written, "samples": len(found), "tokens": found.num_tokens, "bytes": num_bytes,
        "bytes_per_token": num_bytes / found.num_tokens, "seconds": seconds, "tokens_per_second": tokens / seconds,
        "data": examples.counts.summary(),
    }  # fmt: skip
