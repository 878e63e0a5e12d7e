"""Data of recipes for causal language models: records to train on and to test with, their tokens, and batches."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Subset

from pipestill import data
from pipestill.errors import ConfigError, DataError
from pipestill.model.seeding import derive
from pipestill.recipes.language import from_pretrained, transformers
from pipestill.recipes.packages import needed
from pipestill.recipes.text import open_text

_TEST_SHARE = 0.1
_SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

Truncation = Literal["split", "end", "start", "drop", "refuse"]
Records = tuple[data.Record | Mapping[str, Any], ...]


@dataclass(frozen=True, eq=False)
class Texts:
    """Records to train on and others to test with. `name` is for messages."""

    name: str
    train: Records
    test: Records


@dataclass(frozen=True)
class Split:
    """Examples to train on and others to test with."""

    train: data.Examples
    test: data.Examples

    def figures(self) -> dict[str, Any]:
        """Count examples and tokens, for summary.json."""
        parts = {"train": self.train, "test": self.test}
        return {
            name: {"examples": len(part), "tokens": part.counts.num_tokens, "counted": part.counts.num_counted}
            for name, part in parts.items()
        }


@lru_cache(maxsize=4)
def open_texts(path: str | None, validation: str | None, seed: int) -> Texts:
    """Read text, JSON lines or a saved data set; None: the Python language reference.

    Without `validation`, a split of the data set that is called test or validation is to test with, or else a tenth of the
    records, drawn by `seed`. Raises `DataError` for data that is missing or broken.
    """
    if validation is not None:
        return Texts(_name(path), _all(path), _all(validation))
    kept, tested = _parts(path)
    if tested:
        return Texts(_name(path), kept, tested)
    if not _is_records(path):
        corpus = open_text(path, seed)
        return Texts(corpus.name, *(tuple({"text": text} for text in texts) for texts in (corpus.train, corpus.test)))
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(derive(seed, "split"))).tolist()
    held_out = max(1, round(len(kept) * _TEST_SHARE))
    train, test = sorted(order[held_out:]), sorted(order[:held_out])
    return Texts(_name(path), tuple(kept[i] for i in train), tuple(kept[i] for i in test))


def _name(path: str | None) -> str:
    return "the Python language reference" if path is None else f"'{path}'"


def _is_records(path: str | None) -> bool:
    """Tell whether data comes as records: JSON lines or a saved data set; text is cut into pieces first."""
    return path is not None and not isinstance(_opened(path), data.TextFiles)


def _opened(path: str) -> Any:
    """Open the reader of a path; of a data set with splits, that of the split to train on."""
    if not Path(path).exists():
        raise DataError(f"no data at '{path}'; pass a text file, a folder of .txt files, JSON lines, or a saved data set")
    if (Path(path) / "dataset_dict.json").is_file():
        return data.HuggingFace(path, split="train")
    return data.open_records(path)


def _parts(path: str | None) -> tuple[Records, Records]:
    """Read the records of data that comes as such, and those of its own split to test with."""
    if path is None or not _is_records(path):
        return (), ()
    listed = Path(path) / "dataset_dict.json"
    splits = json.loads(listed.read_text()).get("splits", []) if listed.is_file() else []
    held_out = next((name for name in ("test", "validation") if name in splits), None)
    return tuple(_opened(path)), () if held_out is None else tuple(data.HuggingFace(path, split=held_out))


def _all(path: str | None) -> Records:
    """Read all records of a path."""
    if path is not None and _is_records(path):
        return _parts(path)[0]
    corpus = open_text(path, 0)
    return tuple({"text": text} for text in (*corpus.train, *corpus.test))


@lru_cache(maxsize=4)
def trained_tokenizer(texts: tuple[str, ...], vocab_size: int) -> Any:
    """Train a tokenizer of `transformers`, a byte-level BPE of at most `vocab_size` tokens: the same for the same texts."""
    tokenizers = needed("tokenizers", "text is read with tokenizers", "tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(_SPECIAL), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    made = transformers().PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=_SPECIAL[0], eos_token=_SPECIAL[1])
    made.chat_template = _TEMPLATE
    return made


@lru_cache(maxsize=4)
def open_tokenizer(path: str) -> Any:
    """Read the tokenizer of a folder or of a hub name, or a tokenizer.json."""
    if not Path(path).is_file():
        return from_pretrained("AutoTokenizer", path, "tokenizer")
    try:
        return transformers().PreTrainedTokenizerFast(tokenizer_file=path)
    except Exception as error:  # tokenizers raises plain Exception
        raise ConfigError(f"cannot read the tokenizer '{path}': {error}") from None


def has_tokenizer(path: str) -> bool:
    """Tell whether a tokenizer is with a model: a folder may lack one, and what is on the hub has one."""
    folder = Path(path)
    return not folder.is_dir() or any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def strings(records: Records) -> tuple[str, ...]:
    """Find all text that records hold, to train a tokenizer on."""

    def inside(value: Any) -> list[str]:
        if isinstance(value, str):
            return [value]
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        return [text for part in parts for text in inside(part)]

    fields = (record.fields if isinstance(record, data.Record) else record for record in records)
    return tuple(text for one in fields for text in inside(one))


@lru_cache(maxsize=4)
def examples(texts: Texts, tokenizer: Any, max_length: int, truncate: Truncation, answers: Literal["all", "last"]) -> Split:
    """Tokenize; `DataError` where records are wrong, or nothing is left to train on or to test with."""
    options = {"max_length": max_length, "truncate": truncate, "answers": answers}
    parts = []
    for what, records in (("train on", texts.train), ("test with", texts.test)):
        try:
            parts.append(data.tokenize(records, tokenizer, **options))
        except DataError as error:
            raise DataError(f"{texts.name}, of which {len(records)} records are to {what}: {error}") from None
    return Split(*parts)


@dataclass(frozen=True)
class Batches:
    """How examples become batches: packed into rows of `length` tokens, or padded to the longest of the batch."""

    packing: bool
    length: int
    pad: int
    batch_size: int

    def loader(self, part: data.Examples, seed: int, num_samples: int | None = None) -> DataLoader[Any]:
        """Make batches to train on, in an order of its own in each epoch, of the first `num_samples` rows."""
        if self.packing:
            rows: Any = data.Packed(part, self.length)
            rows = rows if num_samples is None else Subset(rows, range(min(num_samples, len(rows))))
            sampler: Any = data.ShuffledSampler(len(rows), derive(seed, "order"))
        else:
            rows = part if num_samples is None else Subset(part, range(min(num_samples, len(part))))
            sampler = data.LengthSampler(part.lengths()[: len(rows)], self.batch_size, derive(seed, "order"))
        return DataLoader(rows, batch_size=self.batch_size, sampler=sampler, collate_fn=self.collate)

    def test_loader(self, part: data.Examples) -> DataLoader[Any]:
        """Make batches to test with, always the same."""
        rows: Any = data.Packed(part, self.length) if self.packing else part
        return DataLoader(rows, batch_size=2 * self.batch_size, collate_fn=self.collate)

    @property
    def collate(self) -> Any:
        """The collator that makes a batch."""
        return data.PackCollator(self.length, self.pad) if self.packing else data.PadCollator(self.pad, multiple_of=8)


def pad_of(tokenizer: Any) -> int:
    """Choose the token that fills rows up: the tokenizer's own, or that of the end, or 0; no model sees it."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if found is None else int(found)
