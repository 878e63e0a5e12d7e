"""Streams: an order that follows from seed and epoch, shares of workers, rows packed as they come, the trainer's reader."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chats import llama, tokenizer
from torch.utils.data import DataLoader

import pipestill as ps
from pipestill.data.orders import generator
from pipestill.data.stream import shuffled
from pipestill.train.data import Reader

WORDS = [f"number {i} is {'odd' if i % 2 else 'even'}" for i in range(40)]


@pytest.fixture
def records(tmp_path: Path) -> ps.data.JsonLines:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{word}"}}\n' for word in WORDS))
    return ps.data.JsonLines(path)


def stream(records: Any, **options: Any) -> ps.data.Stream:
    return ps.data.Stream(records, ps.data.Tokenization(tokenizer()), **options)


def texts(items: Any) -> list[str]:
    return [tokenizer().decode(example.input_ids, skip_special_tokens=True) for example in items]


def test_an_epoch_has_every_example_in_an_order_of_its_own(records: ps.data.JsonLines) -> None:
    data = stream(records, shuffle_buffer=8, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        orders.append(texts(data))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(WORDS)
    assert texts(stream(records)) == WORDS
    assert len(data.counts) == len(WORDS)
    assert "40 of 40 records kept" in data.counts.summary()


def test_each_item_is_drawn_from_those_that_are_held() -> None:
    for size in (0, 1, 4, 100):
        found = list(shuffled(range(50), size, generator(0, "x")))
        assert sorted(found) == list(range(50))
        assert all(item <= place + max(size, 0) for place, item in enumerate(found))


def test_rows_are_packed_as_they_come(records: ps.data.JsonLines) -> None:
    loader = DataLoader(stream(records, pack_length=64), batch_size=2, collate_fn=ps.data.PackCollator(64, 0))
    seen: Counter[str] = Counter()
    for inputs, targets in loader:
        assert inputs["input_ids"].shape[1] == 64
        starts = (inputs["position_ids"] == 0).nonzero().tolist()
        for row, start in starts:
            stop = next((s for r, s in starts if r == row and s > start), 64)
            if (targets["labels"][row, start:stop] != -100).any():
                seen[tokenizer().decode(inputs["input_ids"][row, start:stop], skip_special_tokens=True)] += 1
    assert seen == Counter(WORDS)


@pytest.mark.slow
def test_workers_share_the_records_and_hear_of_epochs(records: ps.data.JsonLines) -> None:
    loader: Any = DataLoader(
        stream(records, shuffle_buffer=4), batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context="fork"
    )
    orders = []
    for epoch in (0, 1, 0):
        loader.dataset.set_epoch(epoch)
        orders.append(texts(loader))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(WORDS)


def test_the_trainers_reader_sets_epochs_of_streams_and_samplers(records: ps.data.JsonLines) -> None:
    found = ps.data.tokenize(records, tokenizer())
    collate = ps.data.PadCollator(0, length=24)
    loaders = [
        DataLoader(stream(records, shuffle_buffer=8), batch_size=4, collate_fn=collate),
        DataLoader(found, batch_size=4, collate_fn=collate, sampler=ps.data.LengthSampler(found.lengths(), 4)),
    ]
    for loader in loaders:
        runs = [[batch.inputs["input_ids"] for batch in Reader(loader, epochs=2, steps=None, seed=seed)] for seed in (0, 1)]
        assert len(runs[0]) == 20
        assert all(map(torch.equal, *runs)), "the order depends on more than its own seed and the epoch"
        assert not all(map(torch.equal, runs[0][:10], runs[0][10:]))


def test_the_first_wrong_record_ends_the_stream_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text"\n')
    loader = DataLoader(stream(ps.data.JsonLines(path)), batch_size=1, collate_fn=ps.data.PadCollator(0))
    with pytest.raises(ps.UserError, match=r"^.*a\.jsonl:2 is no JSON"):
        list(Reader(loader, epochs=1, steps=None, seed=0))


def test_what_can_be_read_once_only_is_refused() -> None:
    with pytest.raises(ps.UserError, match="records can be read once only"):
        stream(iter([{"text": "x"}]))
    with pytest.raises(ps.UserError, match="tokenization is "):
        ps.data.Stream([], tokenizer())


def test_a_stream_trains_a_pipeline(records: ps.data.JsonLines) -> None:
    """Rows of a packed stream through a whole Llama as one block: positions tell what belongs together."""

    def loss(output: Any, target: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output["logits"].flatten(0, 1), target["labels"].flatten())

    model = llama()
    task = ps.Supervised(model, loss, student_cuts=[ps.Block("llama", lambda inputs: {"logits": model(**inputs).logits}, ("",))])
    loader = DataLoader(stream(records, pack_length=64, shuffle_buffer=8), batch_size=2, collate_fn=ps.data.PackCollator(64, 0))
    result = ps.Trainer(task, strategy="reference", lr=0.1, microbatches=1).fit(loader, epochs=2, steps=6)
    assert result.steps == 6
