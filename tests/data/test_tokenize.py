"""What is done with examples that are too long, and the map of what each record counts for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.chats import tokenizer

import pipestill as ps

RECORDS = [
    {"text": "abc"},
    {"prompt": "A generator is a function which", "completion": " returns an iterator."},
    {"text": "xyzuvw"},
]


def lengths(truncate: str, max_length: int = 6) -> tuple[list[int], ps.data.CountedMap]:
    found = ps.data.tokenize(RECORDS, tokenizer(), max_length=max_length, truncate=truncate)
    assert found.lengths() == [len(example) for example in found]
    return found.lengths(), found.counts


def test_longer_examples_are_refused_unless_told_what_to_cut() -> None:
    with pytest.raises(ps.UserError, match=r"record\[1\] has \d+ tokens, more than max_length 6; choose what is cut"):
        lengths("refuse")


def test_each_policy_says_what_it_cut() -> None:
    whole = [len(example) for example in ps.data.tokenize(RECORDS, tokenizer())]
    assert whole[0] == 4
    assert whole[2] == 7
    size, counted = whole[1], ps.data.tokenize(RECORDS, tokenizer())[1].num_counted
    kept, counts = lengths("end")
    assert kept == [4, 6]
    assert counts[1].dropped == "nothing that counts is within max_length 6"
    assert (counts[2].tokens, counts[2].counted, counts[2].truncated, counts[2].truncated_counted) == (6, 5, 1, 1)
    kept, counts = lengths("start")
    assert kept == [4, 6, 6]
    assert (counts[1].tokens, counts[1].truncated, counts[1].counted) == (6, size - 6, min(5, counted))
    kept, counts = lengths("drop")
    assert kept == [4]
    assert [count.dropped for count in counts] == ["", "longer than max_length 6", "longer than max_length 6"]
    kept, counts = lengths("split", max_length=4)
    assert kept[0] == 4
    assert kept[-2:] == [4, 3]
    assert counts[2].pieces == 2
    assert counts[2].truncated == 0
    assert counts[2].truncated_counted == 1  # the first token of the second piece has nothing before it


def test_tokens_and_counts_of_the_map_are_those_of_the_examples() -> None:
    found = ps.data.tokenize(RECORDS, tokenizer(), max_length=5, truncate="split")
    assert found.counts.num_tokens == sum(map(len, found))
    assert found.counts.num_counted == sum(example.num_counted for example in found)
    assert found.counts.num_counted == sum(int((example.labels != -100).sum()) for example in found)


def test_the_summary_reads_well(tmp_path: Path) -> None:
    records = [*RECORDS, {"text": "abcd"}]
    found = ps.data.tokenize(records, tokenizer(), max_length=6, truncate="end")
    assert found.counts.summary() == (
        "3 of 4 records kept: 15 tokens, of which 12 count (80.0%)\n"
        "tokens of a record: 4 to 6, median 5\n"
        "1 record cut: 1 token lost; 1 that would have counted do not\n"
        "1 record dropped: nothing that counts is within max_length 6"
    )
    found.counts.save(tmp_path / "counts.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "counts.jsonl").read_text().splitlines()]
    assert [line["place"] for line in lines] == [f"record[{i}]" for i in range(4)]
    assert sum(line["tokens"] for line in lines) == 15


def test_data_of_which_nothing_counts_is_refused() -> None:
    with pytest.raises(ps.UserError, match="no example is left to train on: .*2 records dropped: longer than max_length 2"):
        ps.data.tokenize([{"text": "abc"}, {"text": "xyz"}], tokenizer(), max_length=2, truncate="drop")
    with pytest.raises(ps.UserError, match="there was no record"):
        ps.data.tokenize([], tokenizer())


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ps.UserError, match="max_length is 1; .*truncate is 'middle'"):
        ps.data.Tokenization(tokenizer(), max_length=1, truncate="middle")  # type: ignore[arg-type]
    with pytest.raises(ps.UserError, match="records are 'a.jsonl'; expected a reader such as"):
        ps.data.tokenize("a.jsonl", tokenizer())  # type: ignore[arg-type]


def test_examples_are_a_sequence() -> None:
    found = ps.data.tokenize(RECORDS, tokenizer())
    assert found[-1].input_ids.equal(found[2].input_ids)
    with pytest.raises(IndexError):
        found[3]
