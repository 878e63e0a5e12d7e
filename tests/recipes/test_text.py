"""Documents of text: embedded, in files, and in saved datasets."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.texts import paragraphs

from pipestill.errors import ConfigError, DataError
from pipestill.recipes import text
from pipestill.recipes.text import Corpus


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
