"""A cache that is read: samples of any order, refusals of what would be wrong, and damaged files."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from support.caches import examples, language_model, loader, write
from support.chats import backend, tokenizer

import pipestill as ps
from pipestill.cache.keys import key_of


def test_targets_travel_through_padding_and_packing(tmp_path: Path) -> None:
    found = write(tmp_path)
    attached = found.attach(examples())
    assert len(attached) == len(examples())
    assert attached.lengths() == examples().lengths()
    inputs, targets = next(iter(loader(attached, batch_size=10)))
    packed = ps.data.Packed(attached, 32)
    _, theirs = ps.data.PackCollator(32, 0)([packed[i] for i in range(len(packed))])
    real = inputs["attention_mask"].bool()
    order = [i for row in packed.rows for i in row]
    flat = torch.cat([targets["teacher_ids"][i, real[i]] for i in order])
    told = theirs["teacher_facts"][..., 0] != 0
    assert theirs["teacher_ids"][told].equal(flat)
    assert theirs["labels"][~told].eq(-100).all()
    over_packed = found.attach(ps.data.Packed(examples(), 32))
    assert ps.data.PackCollator(32, 0)([over_packed[0]])[1]["teacher_ids"].equal(theirs["teacher_ids"][:1])


def test_streams_are_attached_to_as_they_come(tmp_path: Path) -> None:
    records = [{"text": f"number {i}"} for i in range(6)]
    stream = ps.data.Stream(records, ps.data.Tokenization(backend()), shuffle_buffer=3, pack_length=24)
    write(tmp_path, dataset=ps.data.tokenize(records, backend()))
    attached = ps.cache.TeacherCache(tmp_path).attach(stream)
    attached.set_epoch(1)
    assert sum(len(row) for row in attached) == 6
    assert all("teacher_values" in example.extras for row in attached for example in row)


def test_a_cache_of_another_teacher_or_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    assert len(ps.cache.TeacherCache(tmp_path, teacher=language_model(1), tokenizer=tokenizer())) == len(examples())
    more = tokenizer()
    more.add_tokens(["pipestill"])
    with pytest.raises(
        ps.UserError, match="is of another teacher .* and of another tokenizer; write one of this in another folder"
    ):
        ps.cache.TeacherCache(tmp_path, teacher=language_model(2), tokenizer=more)


def test_samples_that_are_missing_or_have_changed_are_named(tmp_path: Path) -> None:
    found = write(tmp_path)
    changed = ps.data.Example(examples()[0].input_ids.flip(0), examples()[0].counted, examples()[0].place)
    unknown = ps.data.Example(examples()[0].input_ids[:2], examples()[0].counted[:2], "other.jsonl:7")
    with pytest.raises(
        ps.UserError, match=r"record\[0\] is not in the teacher cache .* but with others: are they augmented, or token"
    ):
        found.attach([changed])[0]
    with pytest.raises(ps.UserError, match=r"other\.jsonl:7 is not in the teacher cache .*has 10 samples; write what is missing"):
        found.attach([unknown])[0]
    assert found.missing([*examples(), unknown]) == ["other.jsonl:7"]
    assert key_of(examples()[3]) in found


def test_another_temperature_is_refused(tmp_path: Path) -> None:
    found = write(tmp_path, temperatures=(1.0, 2.0))
    found.attach(examples(), temperature=2.0)
    with pytest.raises(ps.UserError, match=r"is for temperatures 1, 2, not 3: .* write it with temperatures=\(1, 2, 3\)"):
        found.attach(examples(), temperature=3.0)


def test_cut_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    (part,) = tmp_path.glob("*.safetensors")
    content = part.read_bytes()
    part.write_bytes(content[:-7])
    with pytest.raises(ps.UserError, match=rf"{part.name}' is damaged or cut off"):
        ps.cache.TeacherCache(tmp_path)
    part.write_bytes(content[:-7] + b"\x01" * 7)
    found = ps.cache.TeacherCache(tmp_path)
    for read in (lambda: found.entry(key_of(examples()[0])), lambda: ps.cache.TeacherCache(tmp_path, verify=True)):
        with pytest.raises(ps.UserError, match="has not the hash that it was written with.; delete it"):
            read()
    part.unlink()
    with pytest.raises(ps.UserError, match="holds no samples"):
        ps.cache.TeacherCache(tmp_path)
    assert len(write(tmp_path)) == len(examples()), "what was deleted is written once more"
    part.write_bytes(content)
    ps.cache.TeacherCache(tmp_path, verify=True)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}', '{"format": 99}'])
def test_what_is_no_manifest_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(ps.UserError, match="there is no teacher cache in"):
        ps.cache.TeacherCache(tmp_path)
    (tmp_path / "cache.json").write_text(content)
    with pytest.raises(ps.UserError, match=r"cache\.json' .*make the cache anew"):
        ps.cache.TeacherCache(tmp_path)


def test_a_cache_travels_to_workers(tmp_path: Path) -> None:
    found = write(tmp_path)
    expected = found.entry(key_of(examples()[0]))
    again = pickle.loads(pickle.dumps(found)).entry(key_of(examples()[0]))
    assert all(again[name].equal(tensor) for name, tensor in expected.items())
