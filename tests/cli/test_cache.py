"""`pipestill cache`: a saved teacher and a file of text become a cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.chats import llama, tokenizer

import pipestill as ps
from pipestill.cli import main


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    llama(layers=1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_a_file_becomes_a_cache_and_is_added_to(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, folder = tmp_path / "a.jsonl", tmp_path / "cache"
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A still."}]
    lines = [{"text": "A generator"}, {"prompt": "is", "completion": " a function"}, {"messages": chat}]
    data.write_text("\n".join(map(json.dumps, lines)))
    words = ["cache", "--teacher", str(saved), "--data", str(data), "--folder", str(folder), "--k", "8", "--dtype", "float32"]
    assert main([*words, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["written"], figures["samples"]) == (3, 3)
    cache = ps.cache.TeacherCache(folder, teacher=llama(layers=1), tokenizer=tokenizer(), verify=True)
    assert cache.num_tokens == figures["tokens"]
    assert cache.missing(ps.data.tokenize(ps.data.JsonLines(data), tokenizer())) == []
    data.write_text(json.dumps({"text": "An iterator"}) + "\n" + data.read_text())
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 of 4 records kept" in shown
    assert "1 samples written" in shown
    assert "which now has 4" in shown


def test_what_is_missing_is_asked_for(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--data", "x.jsonl"]) == 2
    assert "'cache' needs --teacher, --folder" in capsys.readouterr().err
    words = ["cache", "--teacher", str(saved), "--folder", str(tmp_path)]
    assert main([*words, "--data", str(tmp_path / "x.jsonl")]) == 2
    assert "x.jsonl' is missing" in capsys.readouterr().err
    assert main([*words, "--data", str(tmp_path), "--batch_size", "0"]) == 2
    assert "batch_size is 0" in capsys.readouterr().err
