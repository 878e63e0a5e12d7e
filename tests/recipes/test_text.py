"""Text as sequences of tokens, batches of about the same length, and masks."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipestill import losses
from pipestill.errors import ConfigError, DataError
from pipestill.recipes import text
from pipestill.recipes.text import ByLengthSampler, Corpus, Masking, Sequences, Tokens
from pipestill.train.data import Reader

pytest.importorskip("tokenizers")

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "nine", "small", "bears", "sing"]


def paragraphs(count: int, start: int = 0) -> str:
    return "\n\n".join(" ".join(WORDS[(start + i + j) % len(WORDS)] for j in range(3 + i % 9)) for i in range(count))


def tokens() -> Tokens:
    return text.trained_tokens((paragraphs(40),), 150)


def data(count: int, generator: torch.Generator) -> Sequences:
    lengths = torch.randint(4, 30, (count,), generator=generator)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return Sequences(torch.randint(5, 100, (int(lengths.sum()),), generator=generator).int(), starts)


# -- documents --------------------------------------------------------------------------------------------------------


def test_the_embedded_text_is_english_and_split_by_topic() -> None:
    corpus = text.open_text(None, 0)
    assert sum(map(len, text.embedded())) > 300_000
    assert " statement " in " ".join(corpus.test)
    train, test = (
        {" ".join(part.split()) for text in half for part in text.split("\n\n")} for half in (corpus.train, corpus.test)
    )
    assert not train & test - {""}, "topics repeat each other, so a topic to test with was inside one that was trained on"
    assert sorted((*corpus.train, *corpus.test)) == sorted(text.embedded())
    assert len(corpus.test) == round(len(text.embedded()) / 10)
    assert text.open_text(None, 0) == corpus
    assert text.open_text(None, 1) != corpus


def test_one_file_is_cut_into_pieces_to_have_some_to_test_with(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(paragraphs(40))
    for path in (tmp_path, tmp_path / "one.txt"):
        corpus = text.open_text(str(path), 0)
        assert (len(corpus.train), len(corpus.test)) == (9, 1)
        assert sum(len(part.split()) for part in (*corpus.train, *corpus.test)) == len(paragraphs(40).split())


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "none.txt", "no text at"),
        ({"readme.md": b"x"}, "", "holds no .txt file"),
        ({"a.txt": b"text", "b.txt": b" \n"}, "", "b.txt' is empty"),
        ({"a.txt": b"\xff\xfe"}, "", "cannot read .*a.txt' as UTF-8"),
    ],
)
def test_text_that_is_not_there_is_said(files: dict[str, bytes], path: str, message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        text.open_text(str(tmp_path / path), 0)


class Rows(dict[str, list[Any]]):
    """What `datasets` gives for one split, as far as it is used."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (Rows(words=["a"]), "split 'train' has no column 'text', only words"),
        ({"dev": Rows(text=["a"])}, "no split 'train', only dev"),
        ({"train": Rows(text=["a", "", None, "b"]), "test": Rows(text=["c"])}, ""),
        (OSError("a broken\nfile"), "cannot read the dataset .* a broken file"),
    ],
)
def test_saved_datasets(found: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what `load_from_disk` gives; the package itself is no dependency of the tests."""

    def load_from_disk(path: str) -> Any:
        if isinstance(found, OSError):
            raise found
        return dict(found) if not isinstance(found, Rows) else SimpleSplit(found)

    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_from_disk=load_from_disk))
    if message:
        with pytest.raises(DataError, match=message):
            text.open_text(str(tmp_path), 0)
    else:
        assert text.open_text(str(tmp_path), 0) == Corpus(f"'{tmp_path}'", ("a", "b"), ("c",))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install datasets"):
        text.open_text(str(tmp_path), 0)


class SimpleSplit:
    """A split alone, which is no dict."""

    def __init__(self, rows: Rows) -> None:
        self.column_names, self.rows = rows.column_names, rows

    def __getitem__(self, name: str) -> list[Any]:
        return self.rows[name]


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_a_vocabulary_is_the_same_every_time() -> None:
    """The library numbers the characters it begins with by chance, and breaks ties by these numbers."""
    train = text.trained_tokens.__wrapped__  # without its cache
    one, *others = (train(text.embedded()[:8], 400).tokenizer.get_vocab() for _ in range(4))
    assert all(other == one for other in others)
    assert sum(token.startswith("##") for token in one) > 100


def test_tokens_come_back_as_text() -> None:
    made = tokens()
    assert (made.pad, made.cls, made.sep, made.mask) == (0, 2, 3, 4)
    assert made.size <= 150
    (ids,) = made.encode(["The quick dog"])
    assert made.tokenizer.decode(ids) == "the quick dog"


def test_a_tokenizer_file_is_read_and_what_it_lacks_is_said(tmp_path: Path) -> None:
    tokens().tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = text.open_tokens(str(tmp_path / "tokenizer.json"))
    assert (again.size, again.mask, again.encode(["brown fox"])) == (tokens().size, 4, tokens().encode(["brown fox"]))
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.WordPiece({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]")).save(
        str(tmp_path / "bare.json")
    )
    with pytest.raises(ConfigError, match=r"lacks \[CLS\], \[SEP\], \[MASK\]"):
        text.open_tokens(str(tmp_path / "bare.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read the tokenizer"):
        text.open_tokens(str(tmp_path / "broken.json"))


# -- sequences --------------------------------------------------------------------------------------------------------


def test_sequences_hold_every_token_once_and_no_more_than_fit() -> None:
    documents = [paragraphs(30), paragraphs(12, start=5), "fox " * 70]
    found = text.sequences(documents, tokens(), 24)
    assert int(found.lengths().max()) == 24
    inner = [token for sequence in found for token in sequence[1:-1].tolist()]
    assert inner == [token for ids in tokens().encode(documents) for token in ids]
    assert all(sequence[0] == 2 and sequence[-1] == 3 for sequence in found)
    assert [len(sequence) for sequence in found.first(2)] == [len(found[0]), len(found[1])]


def test_a_text_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(DataError, match="too short: it has .* tokens to train on, and one sequence of max_length 5000"):
        text.cut_corpus(Corpus("'a.txt'", (paragraphs(30),), (paragraphs(3),)), tokens(), 5000)
    with pytest.raises(DataError, match="nothing is left to test with; nothing is left to train on"):
        text.cut_corpus(Corpus("'a.txt'", (" ",), ()), tokens(), 24)


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


# -- masks ------------------------------------------------------------------------------------------------------------


def masked(probability: float = 0.15, rows: int = 400) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    few = data(rows, generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inputs, targets = Masking(tokens(), 32, probability)([few[i] for i in range(rows)])
    return few.lengths(), inputs, targets


def test_masks_are_berts() -> None:
    lengths, inputs, targets = masked()
    ids, shown = targets["labels"], inputs["input_ids"]
    assert ids.shape == (400, 32)
    assert torch.equal(inputs["attention_mask"].sum(1), lengths)
    chosen = targets["masked"] > 0
    real = inputs["attention_mask"].bool()
    assert not bool((chosen & ~real).any())
    assert torch.equal(shown[~chosen], ids[~chosen])
    assert float(chosen.sum() / real.sum()) == pytest.approx(0.15, abs=0.02)
    as_mask, kept = (shown[chosen] == 4).double().mean(), (shown[chosen] == ids[chosen]).double().mean()
    assert float(as_mask) == pytest.approx(0.8, abs=0.05)
    assert float(kept) == pytest.approx(0.1, abs=0.04)
    assert 1.0 - float(as_mask + kept) > 0.0


def test_no_special_token_is_masked() -> None:
    sequence = torch.tensor([2, 7, 8, 9, 3], dtype=torch.int32)
    inputs, targets = Masking(tokens(), 8, 0.999)([sequence])
    assert (targets["masked"][0] > 0).tolist() == [False, True, True, True, False, False, False, False]
    assert inputs["input_ids"][0, [0, 4]].tolist() == [2, 3]


def test_weights_make_a_loss_the_mean_over_the_batchs_tokens_however_it_is_cut() -> None:
    _, _, targets = masked(rows=10)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((*targets["labels"].shape, 120), generator=generator)
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets["labels"].flatten(), reduction="none")
    chosen = (targets["masked"] > 0).flatten()
    for cuts in ((10,), (4, 3, 3), (9, 1)):
        total = sum(
            losses.masked_cross_entropy({"logits": part}, {"labels": labels, "masked": weights})["cross_entropy"] * len(part) / 10
            for part, labels, weights in zip(
                logits.split(cuts), targets["labels"].split(cuts), targets["masked"].split(cuts), strict=True
            )
        )
        assert float(total) == pytest.approx(float(each[chosen].mean()), rel=1e-6)


def test_masks_follow_the_run_s_seed_and_epoch() -> None:
    few = data(20, torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(
        few, batch_size=8, sampler=ByLengthSampler(few.lengths(), 8), collate_fn=Masking(tokens(), 32)
    )

    def shown(seed: int) -> list[torch.Tensor]:
        reader = Reader(loader, epochs=2, steps=None, seed=seed, length_axis=1)
        try:
            return [batch.inputs["input_ids"] for batch in reader]
        finally:
            reader.close()

    one, same, other = shown(0), shown(0), shown(1)
    assert len(one) == 6
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one[:3], one[3:], strict=True))
    assert len({batch.shape[1] for batch in one}) > 1


def test_tests_see_the_same_masks_and_weigh_every_masked_token_alike() -> None:
    few = data(20, torch.Generator().manual_seed(0))
    one, same, other = (text.fixed(few, Masking(tokens(), 32), 8, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a[0]["input_ids"], b[0]["input_ids"]) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0][0]["input_ids"], other[0][0]["input_ids"])
    for name in ("masked", "tokens"):
        weights = {float(w) for _, targets in one for w in targets[name].unique() if w}
        count = sum(int((targets[name] > 0).sum()) for _, targets in one)
        assert list(weights) == [pytest.approx(20 / count)]
    assert [batch[0]["input_ids"].shape[0] for batch in one] == [8, 8, 4]
