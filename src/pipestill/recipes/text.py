"""Documents to train on and to test with: the embedded language reference, text files, and saved datasets."""

import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from pipestill.errors import ConfigError, DataError
from pipestill.model.seeding import derive

_PIECES = 10  # that a text of few documents is cut into, to have some to test with
_TEST_SHARE = 0.1
_DATASET_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and others to test with. `name` is for messages."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]


@cache
def embedded() -> tuple[str, ...]:
    """Read the topics of the Python language reference that ships with CPython, about 465,000 characters of English.

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
    """Open what `data` names: a text file, a folder of .txt files, a dataset saved with `save_to_disk`, or for None the embedded.

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
    """Cut ten pieces of about the same length, at ends of paragraphs, or of lines where there are fewer."""
    parts = re.split(r"\n\s*\n", document)
    parts = parts if len(parts) >= _PIECES else document.splitlines()
    bounds = [len(parts) * i // _PIECES for i in range(_PIECES + 1)]
    pieces = ["\n\n".join(parts[a:b]) for a, b in pairwise(bounds)]
    return [piece for piece in pieces if piece.strip()]
