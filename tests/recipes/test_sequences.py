"""Sequences of tokens, and batches of about the same length."""

from __future__ import annotations

import pytest
import torch
from support.texts import data, paragraphs, tokens

from pipestill.errors import DataError
from pipestill.recipes.sequences import ByLengthSampler, cut_corpus, sequences
from pipestill.recipes.text import Corpus

pytest.importorskip("tokenizers")


def test_sequences_hold_every_token_once_and_no_more_than_fit() -> None:
    documents = [paragraphs(30), paragraphs(12, start=5), "fox " * 70]
    found = sequences(documents, tokens(), 24)
    assert int(found.lengths().max()) == 24
    inner = [token for sequence in found for token in sequence[1:-1].tolist()]
    assert inner == [token for ids in tokens().encode(documents) for token in ids]
    assert all(sequence[0] == 2 and sequence[-1] == 3 for sequence in found)
    assert [len(sequence) for sequence in found.first(2)] == [len(found[0]), len(found[1])]


def test_a_text_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(DataError, match="too short: it has .* tokens to train on, and one sequence of max_length 5000"):
        cut_corpus(Corpus("'a.txt'", (paragraphs(30),), (paragraphs(3),)), tokens(), 5000)
    with pytest.raises(DataError, match="nothing is left to test with; nothing is left to train on"):
        cut_corpus(Corpus("'a.txt'", (" ",), ()), tokens(), 24)


def test_batches_are_of_about_the_same_length_and_in_another_order_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = data(203, generator).lengths()
    sampler = ByLengthSampler(lengths, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = list(sampler), list(sampler)
        torch.manual_seed(0)
        again = list(sampler)
    assert sorted(first) == sorted(second) == list(range(203))
    assert first == again != second
    batches = lengths[torch.tensor(first[:200])].view(-1, 8)
    assert int((batches.max(1).values - batches.min(1).values).max()) <= 4 < int(lengths.max() - lengths.min())
    assert batches[:, 0].tolist() != sorted(batches[:, 0].tolist(), reverse=True)
