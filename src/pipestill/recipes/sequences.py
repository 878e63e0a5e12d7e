"""Documents cut into sequences of tokens, and batches of sequences of about the same length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipestill.errors import DataError
from pipestill.recipes.text import Corpus
from pipestill.recipes.tokens import Tokens


@dataclass(frozen=True)
class Sequences(Dataset[Tensor]):
    """Sequences of tokens, one after the other in `ids`; each begins at one of `starts` and ends at the next."""

    ids: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Tensor:
        return self.ids[self.starts[index] : self.starts[index + 1]]

    def lengths(self) -> Tensor:
        return self.starts.diff()

    def first(self, count: int) -> Sequences:
        """Keep the first `count` sequences."""
        starts = self.starts[: count + 1]
        return Sequences(self.ids[: int(starts[-1])], starts)


def sequences(documents: Sequence[str], tokens: Tokens, max_length: int) -> Sequences:
    """Join consecutive paragraphs of each document, as many as fit between [CLS] and [SEP]; long ones are divided."""
    room = max_length - 2
    paragraphs = [[part for part in re.split(r"\n\s*\n", document) if part.strip()] for document in documents]
    encoded = iter(tokens.encode([part for parts in paragraphs for part in parts]))
    found: list[list[int]] = []
    for parts in paragraphs:
        held: list[int] = []
        for _ in parts:
            ids = next(encoded)
            if held and len(held) + len(ids) > room:
                found.append(held)
                held = []
            held = held + ids
            while len(held) > room:
                found.append(held[:room])
                held = held[room:]
        if held:
            found.append(held)
    flat = [[tokens.cls, *ids, tokens.sep] for ids in found]
    starts = torch.tensor([0, *map(len, flat)]).cumsum(0)
    return Sequences(torch.tensor([token for ids in flat for token in ids], dtype=torch.int32), starts)


@lru_cache(maxsize=8)
def cut_corpus(corpus: Corpus, tokens: Tokens, max_length: int) -> tuple[Sequences, Sequences]:
    """Make sequences to train on and to test with; `DataError` where there are none, or less than one whole."""
    train, test = (sequences(documents, tokens, max_length) for documents in (corpus.train, corpus.test))
    problems = []
    if not len(test):
        problems.append("nothing is left to test with")
    if not len(train):
        problems.append("nothing is left to train on")
    elif train.ids.numel() < max_length:
        problems.append(f"it has {train.ids.numel()} tokens to train on, and one sequence of max_length {max_length}")
    if problems:
        words = sum(len(document.split()) for document in (*corpus.train, *corpus.test))
        raise DataError(
            f"{corpus.name} ({words} words) is too short: {'; '.join(problems)}; give more text, or a smaller max_length"
        )
    return train, test


class ByLengthSampler(torch.utils.data.Sampler[int]):
    """Draws every sequence once, in another order each time, so that consecutive `batch_size` ones are about as long.

    A random order is cut into groups of some batches; each is sorted by length, and the batches of all are shuffled. The
    short last batch stays the last.
    """

    _GROUP = 50  # batches

    def __init__(self, lengths: Tensor, batch_size: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Any:
        order = torch.randperm(len(self.lengths))
        whole = len(order) - len(order) % self.batch_size
        groups = order[:whole].split(self._GROUP * self.batch_size)
        batches = [
            batch
            for group in groups
            for batch in group[self.lengths[group].argsort(descending=True, stable=True)].split(self.batch_size)
        ]
        shuffled = [batches[i] for i in torch.randperm(len(batches)).tolist()]
        return iter(torch.cat([*shuffled, order[whole:]]).tolist())
