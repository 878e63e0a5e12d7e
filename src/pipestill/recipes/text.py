"""Text to learn from: the embedded language reference, files, and saved datasets, as sequences of tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipestill.errors import ConfigError, DataError
from pipestill.model.seeding import derive

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PIECES = 10  # that a text of few documents is cut into, to have some to test with
_TEST_SHARE = 0.1
_CHARACTERS = 1_000  # most that a vocabulary begins with: writing of many signs is made of larger pieces
_DATASET_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and others to test with. `name` is for messages."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]


@cache
def embedded() -> tuple[str, ...]:
    """The topics of the Python language reference that ships with CPython, about 465,000 characters of English.

    Topics repeat each other, so a paragraph is left out where an earlier topic has it: none is both trained on and tested
    with. Lines of punctuation, under headings and in tables, are left out too.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        text = re.sub(r"(?m)^[^\w\n]{4,}$", "", topics[name])
        fresh = [part for part in re.split(r"\n\s*\n", text) if " ".join(part.split()) not in seen]
        seen |= {" ".join(part.split()) for part in fresh}
        documents.append("\n\n".join(fresh))
    return tuple(document for document in documents if document.strip())


def open_text(data: str | None, seed: int) -> Corpus:
    """What `data` names: a text file, a folder of .txt files, a dataset saved with `save_to_disk`; None: what is embedded.

    A tenth of the documents, drawn by `seed`, are to test with: topics, files or rows. Of fewer than ten, each is cut into
    ten pieces at ends of paragraphs first. Raises `DataError` for a text that is missing, unreadable or empty.
    """
    if data is None:
        return _split("the Python language reference", embedded(), seed)
    path = Path(data)
    if path.is_dir() and any((path / name).is_file() for name in _DATASET_FILES):
        return _saved_dataset(path, seed)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.txt") if file.is_file())
        if not files:
            raise DataError(f"'{path}' holds no .txt file, and no dataset saved with save_to_disk")
    elif path.is_file():
        files = [path]
    else:
        raise DataError(f"no text at '{path}'; pass a text file, a folder of .txt files, or a saved dataset")
    texts, problems = [], []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"cannot read '{file}' as UTF-8 text: {error}")
    problems += [f"'{file}' is empty" for file, text in zip(files, texts, strict=False) if not problems and not text.strip()]
    if problems:
        raise DataError("; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else ""))
    return _split(f"'{path}'", tuple(texts), seed)


def _saved_dataset(path: Path, seed: int) -> Corpus:
    try:
        from datasets import load_from_disk
    except ImportError:
        raise ConfigError(f"'{path}' is a saved dataset, which needs the package datasets; run pip install datasets") from None
    try:
        found: Any = load_from_disk(str(path))
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise DataError(f"cannot read the dataset '{path}': {' '.join(str(error).split())}") from None
    parts = dict(found) if isinstance(found, dict) else {"train": found}
    held_out = next((name for name in ("test", "validation") if name in parts), None)
    wanted = ["train", *([held_out] if held_out else [])]
    problems = [
        f"'{path}' has no split 'train', only {', '.join(parts)}" if name not in parts
        else f"its split '{name}' has no column 'text', only {', '.join(parts[name].column_names)}"
        for name in wanted
        if name not in parts or "text" not in parts[name].column_names
    ]  # fmt: skip
    if problems:
        raise DataError(f"dataset '{path}': {'; '.join(problems)}")
    texts = {name: tuple(text for text in parts[name]["text"] if text and text.strip()) for name in wanted}
    if held_out:
        return Corpus(f"'{path}'", texts["train"], texts[held_out])
    return _split(f"'{path}'", texts["train"], seed)


def _split(name: str, documents: tuple[str, ...], seed: int) -> Corpus:
    if len(documents) < _PIECES:
        documents = tuple(piece for document in documents for piece in _pieces(document))
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(derive(seed, "split"))).tolist()
    held_out = max(1, round(len(documents) * _TEST_SHARE))
    train, test = sorted(order[held_out:]), sorted(order[:held_out])
    return Corpus(name, tuple(documents[i] for i in train), tuple(documents[i] for i in test))


def _pieces(document: str) -> list[str]:
    """Ten pieces of about the same length, cut at ends of paragraphs, or of lines where there are fewer."""
    parts = re.split(r"\n\s*\n", document)
    parts = parts if len(parts) >= _PIECES else document.splitlines()
    bounds = [len(parts) * i // _PIECES for i in range(_PIECES + 1)]
    pieces = ["\n\n".join(parts[a:b]) for a, b in pairwise(bounds)]
    return [piece for piece in pieces if piece.strip()]


# -- tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """A tokenizer with the numbers of the tokens that BERT needs. `origin` is for messages."""

    tokenizer: Any
    origin: str
    size: int
    pad: int
    cls: int
    sep: int
    mask: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, without [CLS] and [SEP]."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]


@lru_cache(maxsize=8)
def trained_tokens(texts: tuple[str, ...], vocab_size: int) -> Tokens:
    """A WordPiece vocabulary of lower-case text, of at most `vocab_size` tokens: the same for the same texts.

    The library numbers the characters that it begins with in an order of its own each time, and breaks ties by these
    numbers. So it is given them as tokens that are there already.
    """
    tokenizers = _tokenizers()
    normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    splitter = tokenizers.pre_tokenizers.BertPreTokenizer()
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for place, character in enumerate(word):
            characters[f"##{character}" if place else character] += count
    ranked = sorted(characters, key=lambda character: (-characters[character], character))
    begin = [*SPECIAL, *sorted(ranked[: min(_CHARACTERS, vocab_size - len(SPECIAL))])]

    def tokenizer(model: Any) -> Any:
        made = tokenizers.Tokenizer(model)
        made.normalizer, made.pre_tokenizer = normalizer, splitter
        made.decoder = tokenizers.decoders.WordPiece()
        return made

    trained = tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=begin, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    made = tokenizer(tokenizers.models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    made.add_special_tokens(list(SPECIAL))
    return _tokens(made, "trained on the text", dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True)))


def open_tokens(path: str) -> Tokens:
    """A tokenizer from a tokenizer.json, or from the directory or hub name of a Hugging Face model; `ConfigError`s."""
    if Path(path).is_file():
        tokenizers = _tokenizers()
        try:
            made = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # tokenizers raises plain Exception
            raise ConfigError(f"cannot read the tokenizer '{path}': {error}") from None
        return _tokens(made, f"'{path}'", {})
    from pipestill.recipes.language import from_pretrained

    fast = from_pretrained("AutoTokenizer", path, "tokenizer")
    made = getattr(fast, "backend_tokenizer", None)
    if made is None:
        raise ConfigError(f"the tokenizer '{path}' has no tokenizer.json; save it with a fast tokenizer's save_pretrained")
    made.no_padding()
    made.no_truncation()
    names = {name: getattr(fast, f"{name}_token") for name in ("pad", "cls", "sep", "mask")}
    return _tokens(made, f"'{path}'", {name: token for name, token in names.items() if token is not None})


def _tokens(made: Any, origin: str, names: dict[str, str]) -> Tokens:
    usual = {"pad": ("[PAD]", "<pad>"), "cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "mask": ("[MASK]", "<mask>")}
    numbers: dict[str, int] = {}
    for name, known in usual.items():
        found = [made.token_to_id(token) for token in ((names[name],) if name in names else known)]
        if present := [number for number in found if number is not None]:
            numbers[name] = present[0]
    if missing := [known[0] for name, known in usual.items() if name not in numbers]:
        raise ConfigError(f"the tokenizer {origin} lacks {', '.join(missing)}, which masked language models need")
    return Tokens(made, origin, made.get_vocab_size(), **numbers)


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ConfigError("text is read with tokenizers, which is not installed; run pip install tokenizers") from None
    return tokenizers


# -- sequences --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequences(Dataset[Tensor]):
    """Sequences of tokens, one after the other in `ids`; each begins at one of `starts` and ends at the next."""

    ids: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Tensor:
        return self.ids[self.starts[index] : self.starts[index + 1]]

    def lengths(self) -> Tensor:
        return self.starts.diff()

    def first(self, count: int) -> Sequences:
        """Only the first ones."""
        starts = self.starts[: count + 1]
        return Sequences(self.ids[: int(starts[-1])], starts)


def sequences(documents: Sequence[str], tokens: Tokens, max_length: int) -> Sequences:
    """Consecutive paragraphs of each document, as many as fit between [CLS] and [SEP]; long ones are cut."""
    room = max_length - 2
    paragraphs = [[part for part in re.split(r"\n\s*\n", document) if part.strip()] for document in documents]
    encoded = iter(tokens.encode([part for parts in paragraphs for part in parts]))
    found: list[list[int]] = []
    for parts in paragraphs:
        held: list[int] = []
        for _ in parts:
            ids = next(encoded)
            if held and len(held) + len(ids) > room:
                found.append(held)
                held = []
            held = held + ids
            while len(held) > room:
                found.append(held[:room])
                held = held[room:]
        if held:
            found.append(held)
    flat = [[tokens.cls, *ids, tokens.sep] for ids in found]
    starts = torch.tensor([0, *map(len, flat)]).cumsum(0)
    return Sequences(torch.tensor([token for ids in flat for token in ids], dtype=torch.int32), starts)


@lru_cache(maxsize=8)
def cut_corpus(corpus: Corpus, tokens: Tokens, max_length: int) -> tuple[Sequences, Sequences]:
    """Sequences to train on and to test with; `DataError` where there are none, or less than one whole."""
    train, test = (sequences(documents, tokens, max_length) for documents in (corpus.train, corpus.test))
    problems = []
    if not len(test):
        problems.append("nothing is left to test with")
    if not len(train):
        problems.append("nothing is left to train on")
    elif train.ids.numel() < max_length:
        problems.append(f"it has {train.ids.numel()} tokens to train on, and one sequence of max_length {max_length}")
    if problems:
        words = sum(len(document.split()) for document in (*corpus.train, *corpus.test))
        raise DataError(
            f"{corpus.name} ({words} words) is too short: {'; '.join(problems)}; give more text, or a smaller max_length"
        )
    return train, test


class ByLengthSampler(torch.utils.data.Sampler[int]):
    """Every sequence once, in an order of its own each time, such that consecutive `batch_size` ones are about as long.

    A random order is cut into groups of some batches; each is sorted by length, and the batches of all are shuffled. The
    short last batch stays the last.
    """

    _GROUP = 50  # batches

    def __init__(self, lengths: Tensor, batch_size: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Any:
        order = torch.randperm(len(self.lengths))
        whole = len(order) - len(order) % self.batch_size
        groups = order[:whole].split(self._GROUP * self.batch_size)
        batches = [
            batch
            for group in groups
            for batch in group[self.lengths[group].argsort(descending=True, stable=True)].split(self.batch_size)
        ]
        shuffled = [batches[i] for i in torch.randperm(len(batches)).tolist()]
        return iter(torch.cat([*shuffled, order[whole:]]).tolist())


Batch = tuple[dict[str, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Masking:
    """Sequences -> (inputs, targets) of a masked language model, drawn anew each time.

    Inputs: `input_ids` and `attention_mask` (rows, length). Targets: see `losses.MaskedDistillation`. Of the tokens but [CLS]
    and [SEP], a share of `probability` is to be found; of these 80 % read [MASK], 10 % are another token and 10 % are left
    (Devlin et al. 2019, section 3.1). Sequences are padded to `length`, or to the longest, rounded up to a multiple of 8.
    """

    tokens: Tokens
    max_length: int
    probability: float = 0.15
    vary: bool = True

    def __call__(self, samples: Sequence[Tensor]) -> Batch:
        longest = max(len(sample) for sample in samples) if self.vary else self.max_length
        length = min(-(-longest // 8) * 8, self.max_length)
        ids = torch.full((len(samples), length), self.tokens.pad, dtype=torch.int64)
        for row, sample in zip(ids, samples, strict=True):
            row[: len(sample)] = sample
        lengths = torch.tensor([len(sample) for sample in samples])
        real = torch.arange(length) < lengths[:, None]
        inner = real & (ids != self.tokens.cls) & (ids != self.tokens.sep)
        chosen = (torch.rand(ids.shape) < self.probability) & inner
        draw, other = torch.rand(ids.shape), torch.randint(self.tokens.size, ids.shape)
        shown = torch.where(chosen & (draw < 0.8), self.tokens.mask, ids)
        shown = torch.where(chosen & (draw >= 0.9), other, shown)
        inputs = {"input_ids": shown, "attention_mask": real.long()}
        return inputs, {"labels": ids, "masked": _shares(chosen), "tokens": _shares(real)}


def _shares(counted: Tensor) -> Tensor:
    """Weights (rows, length) whose sums over rows have as their mean the mean over what is counted."""
    return counted.float() * (len(counted) / max(1, int(counted.sum())))


@dataclass(frozen=True)
class Fixed(Dataset[int]):
    """Batches that are masked once, for all tests alike; weights are those of all of them together."""

    batches: tuple[Batch, ...]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        return self.batches[index]


def fixed(data: Sequences, masking: Masking, batch_size: int, seed: int) -> Fixed:
    """All of `data` in batches, from the longest sequence to the shortest, masked by `seed`.

    The mean of a metric over their rows is its mean over all masked tokens.
    """
    order = data.lengths().argsort(descending=True, stable=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "test masks"))
        batches = [masking([data[int(i)] for i in part]) for part in order.split(batch_size)]
    rows = len(data)
    for name in ("masked", "tokens"):
        total = sum(int(targets[name].count_nonzero()) for _, targets in batches)
        for _, targets in batches:
            targets[name] = (targets[name] > 0).float() * (rows / max(1, total))
    return Fixed(tuple(batches))
