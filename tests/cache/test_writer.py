"""What is written is what the teacher says, each sample once, and nothing that would be wrong later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.caches import WORDS, examples, language_model, loader, write
from support.chats import backend

import pipestill as ps
from pipestill.cache.keys import key_of


def teacher_logits(example: ps.data.Example) -> torch.Tensor:
    inputs = {"input_ids": example.input_ids[None], "attention_mask": torch.ones_like(example.input_ids)[None]}
    with torch.no_grad():
        return language_model(1)(inputs)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("bfloat16", 4e-3), ("float16", 5e-4)])
def test_entries_hold_the_largest_logits_and_the_rest(dtype: str, tolerance: float, tmp_path: Path) -> None:
    found = write(tmp_path, dtype=dtype, temperatures=(1.0, 2.0))
    for example in examples():
        entry, logits = found.entry(key_of(example)), teacher_logits(example).double()
        values, ids = logits.topk(8, -1)
        assert entry["ids"].equal(ids.int())
        offset = 0.0 if dtype == "float32" else values[:, :1]
        torch.testing.assert_close(entry["values"].double(), values - offset, rtol=tolerance, atol=1e-6)
        for column, temperature in enumerate((1.0, 2.0)):
            whole = torch.cat([(values - offset) / temperature, entry["tails"][:, column : column + 1]], -1).logsumexp(-1)
            shift = 0.0 if dtype == "float32" else values[:, 0] / temperature
            torch.testing.assert_close(whole, (logits / temperature).logsumexp(-1) - shift, rtol=1e-6, atol=1e-6)


def test_each_sample_is_written_once_in_files_of_bounded_size(tmp_path: Path) -> None:
    twice = torch.utils.data.ConcatDataset([ps.cache.keyed(examples())] * 2)
    teacher = language_model(1)
    with ps.cache.Writer(tmp_path, teacher, backend(), k=8, part_bytes=1000) as writer:
        assert ps.cache.fill(writer, teacher, loader(twice)) == len(examples())
        assert len(writer) == len(examples())
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with ps.cache.Writer(tmp_path, teacher, backend(), k=8) as again:
        assert ps.cache.fill(again, teacher, loader(twice)) == 0
    assert len(ps.cache.TeacherCache(tmp_path)) == len(examples())


def test_a_pass_goes_on_where_a_killed_one_ended(tmp_path: Path) -> None:
    teacher, part = language_model(1), torch.utils.data.Subset(examples(), range(6))
    written = ps.cache.Writer(tmp_path, teacher, backend(), k=8, part_bytes=1)
    ps.cache.fill(written, teacher, loader(ps.cache.keyed(part)))
    (tmp_path / ".half.safetensors.1.part").write_bytes(b"half")  # what a killed writer leaves
    again = ps.cache.Writer(tmp_path, teacher, backend(), k=8)
    assert ps.cache.fill(again, teacher, loader(ps.cache.keyed(examples()))) == len(examples()) - 6
    assert ps.cache.TeacherCache(tmp_path, verify=True).missing(examples()) == []


def test_layout_order_and_padding_do_not_matter(tmp_path: Path) -> None:
    one = write(tmp_path / "one")
    other_order = torch.utils.data.Subset(examples(), [7, 2, 9, 0, 4, 1, 8, 3, 6, 5])
    teacher = language_model(1)
    with ps.cache.Writer(tmp_path / "two", teacher, backend(), k=8, dtype="float32") as writer:
        ps.cache.fill(writer, teacher, loader(ps.cache.keyed(other_order), batch_size=3))
    two = ps.cache.TeacherCache(tmp_path / "two")
    for example in examples():
        ours, theirs = (found.entry(key_of(example)) for found in (one, two))
        assert ours["ids"].equal(theirs["ids"])
        torch.testing.assert_close(ours["values"], theirs["values"], rtol=1e-6, atol=1e-6)


def test_augmented_inputs_are_refused_while_writing(tmp_path: Path) -> None:
    class Augmented(torch.utils.data.Dataset[Any]):
        """Images that are another each time."""

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            return torch.rand(3), index

    teacher = torch.nn.Linear(3, 5)
    images = torch.utils.data.DataLoader(ps.cache.keyed(Augmented()), batch_size=2)
    with ps.cache.Writer(tmp_path, teacher, k=2) as writer:
        ps.cache.fill(writer, teacher, images)
        with pytest.raises(ps.UserError, match="inputs do not change, and those of one place have changed: are they augmented"):
            ps.cache.fill(writer, teacher, images)


def test_a_cache_of_something_else_is_not_added_to(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ps.UserError, match="is of another teacher; .*of k 8, not 4; .*use another folder"):
        ps.cache.Writer(tmp_path, language_model(2), backend(), k=4, dtype="float32")
    with pytest.raises(ps.UserError, match="is of another tokenizer"):
        ps.cache.Writer(tmp_path, language_model(1), "0123", k=8, dtype="float32")


def test_hidden_states_are_kept_beside_the_logits(tmp_path: Path) -> None:
    model = language_model(1)

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = model[:-1], model[-1]

        def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
            hidden = self.body(inputs)
            return {"logits": self.head(hidden), "last_hidden_state": hidden}

    teacher = Both()
    with ps.cache.Writer(tmp_path, teacher, backend(), k=8, dtype="float32", hidden=("last_hidden_state",)) as writer:
        ps.cache.fill(writer, teacher, loader(ps.cache.keyed(examples())))
    attached = ps.cache.TeacherCache(tmp_path).attach(examples())
    for example in attached:
        expected = model[:-1]({"input_ids": example.input_ids[None], "attention_mask": torch.ones_like(example.input_ids)[None]})[
            0
        ]
        torch.testing.assert_close(example.extras["teacher_last_hidden_state"], expected, rtol=1e-6, atol=1e-6)
    writer = ps.cache.Writer(tmp_path / "b", teacher, k=8, hidden=("states",))
    with pytest.raises(ps.UserError, match="gave no 'states' for each token, only logits, last_hidden_state"):
        ps.cache.fill(writer, teacher, loader(ps.cache.keyed(examples())))


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    target = next(iter(loader(ps.cache.keyed(examples()))))[1]
    lead = target["labels"].shape
    with pytest.raises(ps.UserError, match="k is 0; .*dtype is 'int8'"):
        ps.cache.Writer(tmp_path, "x", k=0, dtype="int8")
    with pytest.raises(ps.UserError, match="a temperature is 0"):
        ps.cache.Writer(tmp_path, "x", temperatures=(0,))
    writer = ps.cache.Writer(tmp_path, "x", k=8)
    with pytest.raises(ps.UserError, match="logits are not finite"):
        writer.add(torch.full((*lead, WORDS), torch.nan), target)
    with pytest.raises(ps.UserError, match="expected the same axes before the last"):
        writer.add(torch.zeros(lead[0], WORDS), target)
    with pytest.raises(ps.UserError, match=f"gave 7 logits, and the cache is of {WORDS}"):
        writer.add(torch.zeros(*lead, 7), target)
    with pytest.raises(ps.UserError, match="keep k=8 logits, and the teacher gives 7; choose a smaller k"):
        ps.cache.Writer(tmp_path, "x", k=8).add(torch.zeros(*lead, 7), target)
    assert not list(tmp_path.iterdir())
