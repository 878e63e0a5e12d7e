"""A small teacher of language, data for it, and caches of what it says."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pipestill as ps
from support.chats import TEXT, backend

WORDS = 300


class Embed(nn.Module):
    """Token embeddings, with a running sum so that a token's value depends on those before it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, features)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        values: Tensor = self.table(inputs["input_ids"]) * inputs["attention_mask"][..., None]
        return values.cumsum(1) / 4


def language_model(seed: int, features: int = 8, layers: int = 2) -> nn.Sequential:
    """Causal, and with logits that do not depend on right padding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = [m for _ in range(layers) for m in (nn.Linear(features, features), nn.Tanh())]
        return nn.Sequential(Embed(features), *hidden, nn.Linear(features, WORDS))


@cache
def examples() -> ps.data.Examples:
    """Ten examples of 5 to 17 tokens; half of them are completions, of which not every token counts."""
    records: list[dict[str, str]] = []
    for i in range(5):
        text = TEXT[i % 3]
        records += [{"text": text[: 6 + 4 * i]}, {"prompt": text[: 5 + i], "completion": text[5 + i : 12 + 3 * i]}]
    return ps.data.tokenize(records, backend())


def loader(dataset: Any, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=batch_size, collate_fn=ps.data.PadCollator(0), **options)


def write(folder: Path, teacher: nn.Module | None = None, dataset: Any = None, **options: Any) -> ps.cache.TeacherCache:
    """A cache of what a teacher says of the examples, in float32."""
    teacher = teacher or language_model(1)
    settings = {"k": 8, "dtype": "float32", **options}
    with ps.cache.Writer(folder, teacher, backend(), **settings) as writer:
        ps.cache.fill(writer, teacher, loader(ps.cache.keyed(examples() if dataset is None else dataset)))
    return ps.cache.TeacherCache(folder)


def student() -> nn.Sequential:
    return language_model(5, features=4)


def record_on_ranks(folder: Path, devices: int) -> dict[str, Any]:
    """Distil on processes, each with a writer of its own, and then train from the cache; what rank 0 knows of both runs."""
    teacher = language_model(1)
    options: dict[str, Any] = {
        "devices": devices,
        "lr": 0.05,
        "length_axis": 1,
        "microbatches": 3,
        "log_every": 1,
        "device": "cpu",
    }
    with ps.cache.Writer(folder, teacher, backend(), k=8, dtype="float32", part_bytes=2000) as writer:
        task: Any = ps.Distillation(teacher, student(), ps.cache.Recorded(ps.losses.TopKKL(8), writer))
        live = ps.Trainer(task, strategy="fill", **options).fit(loader(ps.cache.keyed(examples())), epochs=2)
    torch.distributed.barrier()  # the other rank is the one that writes
    attached = ps.cache.TeacherCache(folder, tokenizer=backend(), verify=True).attach(examples())
    task = ps.Supervised(student(), ps.losses.CachedTopK())
    cached = ps.Trainer(task, strategy="fill", **options).fit(loader(attached), epochs=2)
    return {"live": live.losses, "cached": cached.losses, "weights": task.student.state_dict()}
