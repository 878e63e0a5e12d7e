"""Readers of files, and what they say of files that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.chats import tokenizer

import pipestill as ps


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_json_lines_are_read_anew_each_time_with_their_places(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\ufeff{"text": "one"}\n\n{"text": "two"}\r\n')
    records = ps.data.JsonLines(path)
    found = [(record.place, dict(record.fields)) for record in records]
    assert found == [(f"{path}:1", {"text": "one"}), (f"{path}:3", {"text": "two"})]
    assert len(list(records)) == 2


def test_bad_lines_are_one_message_with_file_and_line(tmp_path: Path) -> None:
    lines = [
        b'{"text": "fine"}',
        b'{"text": "cut',
        b"[1]",
        b'{"text": "\xff"}',
        b'{"text": ""}',
        b'{"body": "x"}',
        b'{"messages": []}',
    ]
    path = write(tmp_path / "bad.jsonl", b"\n".join(lines))
    with pytest.raises(ps.UserError) as caught:
        ps.data.tokenize(ps.data.JsonLines(path), tokenizer())
    message = str(caught.value)
    expected = (
        "bad.jsonl:2 is no JSON",
        "bad.jsonl:3 holds [1]",
        "bad.jsonl:4 is no UTF-8",
        "bad.jsonl:5 has text ''",
        "and 1 more",
    )
    assert all(part in message for part in expected), message
    assert "expected 'text', 'prompt' and 'completion', or 'messages'" in message


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(ps.UserError, match=r"a\.jsonl' is missing.*b\.jsonl' is missing"):
        ps.data.JsonLines([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    with pytest.raises(ps.UserError, match="is a folder"):
        ps.data.JsonLines(tmp_path)
    with pytest.raises(ps.UserError, match=r"holds no \.txt file"):
        ps.data.TextFiles(tmp_path)


def test_text_is_read_by_file_paragraph_or_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\ntwo\n\n \n  three\nfour\n")
    units = {
        unit: [(r.place.rpartition(":")[2], r.fields["text"]) for r in ps.data.TextFiles(path, unit)]
        for unit in ("paragraph", "line")
    }
    assert units["paragraph"] == [("1", "one\ntwo"), ("5", "three\nfour\n")]
    assert units["line"] == [("1", "one"), ("2", "two"), ("5", "  three"), ("6", "four")]
    assert [r.fields["text"] for r in ps.data.TextFiles(tmp_path)] == [path.read_text()]


def test_text_that_is_no_utf8_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"fine\nb\xe9d\n")
    with pytest.raises(ps.UserError, match=r"a\.txt:2 is no UTF-8 text"):
        ps.data.tokenize(ps.data.TextFiles(path), tokenizer())


def test_open_records_chooses_by_name(tmp_path: Path) -> None:
    assert isinstance(ps.data.open_records(write(tmp_path / "a.jsonl", "{}")), ps.data.JsonLines)
    assert isinstance(ps.data.open_records(write(tmp_path / "a.txt", "x")), ps.data.TextFiles)
    assert isinstance(ps.data.open_records(tmp_path), ps.data.TextFiles)


class Rows(list[dict[str, Any]]):
    """What a data set of `datasets` looks like from here."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_rows_of_data_sets_are_records_and_are_told_the_epoch() -> None:
    rows = Rows([{"text": "one"}, {"text": "two"}])
    found = ps.data.HuggingFace(rows, name="mine")
    assert [record.place for record in found] == ["mine[0]", "mine[1]"]
    found.set_epoch(3)
    assert rows.epoch == 3
    with pytest.raises(ps.UserError, match="has splits \\(train, test\\) and no split was given"):
        ps.data.HuggingFace({"train": rows, "test": rows})
    assert len(list(ps.data.HuggingFace({"train": rows, "test": rows}, "test"))) == 2


@pytest.mark.slow
def test_data_sets_of_the_package_itself(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list([{"text": f"row {i}"} for i in range(8)])
    whole.save_to_disk(str(tmp_path / "saved"))
    assert len(list(ps.data.open_records(tmp_path / "saved"))) == 8
    stream = ps.data.HuggingFace(whole.to_iterable_dataset().shuffle(seed=1, buffer_size=4))
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append([record.fields["text"] for record in stream])
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
