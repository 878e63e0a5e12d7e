"""Records of text as they lie on disk: JSON lines, plain text files and Hugging Face datasets."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipestill.arguments import raise_problems, shown
from pipestill.errors import ConfigError, DataError

_DATASET_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")
_SHOWN = 5  # problems of data that one message lists
UNITS = ("file", "paragraph", "line")


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a data set that is no tokens yet."""

    place: str
    """Where it is, for messages: a file and the number of a line, from 1, or a data set and the number of a row, from 0."""
    fields: Mapping[str, Any]
    """Its content: `text`, `prompt` and `completion`, or `messages`."""
    problem: str = ""
    """Why it could not be read; empty where it was."""


class JsonLines:
    """The records of files that hold one JSON object a line, read anew by each iteration.

    Empty lines are passed over. A line that is no JSON object is a record with a problem, which `tokenize` and `Stream` refuse.

    Args:
        paths: a file, or several, which are read one after the other.

    Raises:
        DataError: a file is missing, or there is none.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path]) -> None:
        self.paths = _files(paths)

    def __iter__(self) -> Iterator[Record]:
        for path in self.paths:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _parsed(f"{path}:{number}", line)


def _parsed(place: str, line: bytes) -> Record:
    """The record of one line."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Record(place, {}, f"is no UTF-8 text ({error.reason} at byte {error.start})")
    except ValueError as error:
        return Record(place, {}, f"is no JSON ({error})")
    except RecursionError:
        return Record(place, {}, "is no JSON that can be read: it is nested too deeply")
    if not isinstance(value, dict):
        return Record(place, {}, f"holds {shown(value)}; expected a JSON object, one a line")
    return Record(place, value)


class TextFiles:
    """The records of plain text in UTF-8, each with the field `text`, read anew by each iteration.

    Args:
        paths: a file, or several, or a folder, of which all files that end with .txt are read in the order of their names.
        unit: what one record is: "file", "paragraph" (ended by an empty line) or "line". Empty ones are passed over.

    Raises:
        DataError: a file is missing, or there is none.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], unit: Literal["file", "paragraph", "line"] = "file") -> None:
        if unit not in UNITS:
            raise ConfigError(f"unit is {shown(unit)}; expected one of {', '.join(UNITS)}")
        self.unit = unit
        if isinstance(paths, (str, Path)) and Path(paths).is_dir():
            self.paths = sorted(path for path in Path(paths).rglob("*.txt") if path.is_file())
            if not self.paths:
                raise DataError(f"'{paths}' holds no .txt file; pass a folder that does, or files")
        else:
            self.paths = _files(paths)

    def __iter__(self) -> Iterator[Record]:
        for path in self.paths:
            try:
                text = path.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                line = path.read_bytes()[: error.start].count(b"\n") + 1
                yield Record(f"{path}:{line}", {}, f"is no UTF-8 text ({error.reason})")
                continue
            if not text.strip():
                yield Record(str(path), {}, "is empty")
            yield from self._units(path, text)

    def _units(self, path: Path, text: str) -> Iterator[Record]:
        """The records of one file, each with the number of the line on which it begins."""
        if self.unit == "file":
            if text.strip():
                yield Record(str(path), {"text": text})
            return
        end = r"\n" if self.unit == "line" else r"\n[^\S\n]*\n\s*"
        start = 0
        for found in [*re.finditer(end, text), None]:
            piece = text[start : found.start() if found else len(text)]
            if piece.strip():
                first = start + len(piece) - len(piece.lstrip())
                yield Record(f"{path}:{text.count(chr(10), 0, first) + 1}", {"text": piece.rstrip("\r")})
            start = found.end() if found else start


class HuggingFace:
    """The records of a data set of Hugging Face `datasets`, read row by row, anew by each iteration.

    A streaming data set is told the epoch (`set_epoch`), which its own shuffling follows, and its rows are read as they come.

    Args:
        dataset: a `Dataset` or an `IterableDataset`, or the path of one that was saved with `save_to_disk`.
        split: which split is read, where the data set has several.
        name: what messages call the data set. Default: its path, or "dataset".

    Raises:
        ConfigError: a path is given and the package `datasets` is not installed.
        DataError: there is no data set there, or it has several splits and none of this name.
    """

    def __init__(self, dataset: Any, split: str | None = None, name: str | None = None) -> None:
        self.name = name or (str(dataset) if isinstance(dataset, (str, Path)) else "dataset")
        found = _saved(dataset) if isinstance(dataset, (str, Path)) else dataset
        if isinstance(found, Mapping):
            if split not in found:
                given = "no split was given" if split is None else f"it has no split {shown(split)}"
                raise DataError(f"the data set '{self.name}' has splits ({', '.join(map(str, found))}) and {given}; give split=")
            found = found[split]
        elif split is not None:
            raise DataError(f"the data set '{self.name}' has no splits; leave out split={split!r}")
        if not isinstance(found, Iterable):
            raise DataError(f"the data set '{self.name}' is {shown(found)}; expected a data set of Hugging Face datasets")
        self.dataset = found

    def set_epoch(self, epoch: int) -> None:
        """Tell a streaming data set the epoch.

        Args:
            epoch: the number of the pass over the data, from 0.
        """
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Record]:
        yield from _rows(self.dataset, self.name)


def _saved(path: str | Path) -> Any:
    """Open a data set that was saved with `save_to_disk`."""
    try:
        from datasets import load_from_disk
    except ImportError:
        raise ConfigError(f"'{path}' is read with the package datasets; run pip install datasets") from None
    try:
        return load_from_disk(str(path))
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise DataError(f"cannot read the data set '{path}': {' '.join(str(error).split())}") from None


def _rows(rows: Iterable[Any], name: str) -> Iterator[Record]:
    """Records of dicts; a `Record` stays as it is."""
    for number, row in enumerate(rows):
        if isinstance(row, Record):
            yield row
        elif isinstance(row, Mapping):
            yield Record(f"{name}[{number}]", row)
        else:
            yield Record(f"{name}[{number}]", {}, f"is {shown(row)}; expected a dict of fields")


Records = Iterable[Record | Mapping[str, Any]]
"""What yields records, or dicts of the same fields: a reader of this module, a list, a data set of `datasets`."""


def records_of(source: Records) -> Iterator[Record]:
    """Yield the records of a source, dicts with the place `record[number]`."""
    if isinstance(source, (str, bytes, Mapping)) or not isinstance(source, Iterable):
        raise DataError(f"records are {shown(source)}; expected a reader such as ps.data.JsonLines(path), or a list of dicts")
    return _rows(source, "record")


def open_records(path: str | Path) -> JsonLines | TextFiles | HuggingFace:
    """Choose the reader of a path: .jsonl or .json, a saved data set, else text, a file or a folder of .txt files.

    Args:
        path: the file or folder.

    Raises:
        DataError: nothing is there.
    """
    path = Path(path)
    if path.is_dir() and any((path / name).is_file() for name in _DATASET_FILES):
        return HuggingFace(path)
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        return JsonLines(path)
    return TextFiles(path)


def refuse_bad(problems: Sequence[str]) -> None:
    """Raise one `DataError` with the first few problems and the number of the others; do nothing where there are none."""
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    raise_problems([*problems[:_SHOWN], *more], DataError)


def _files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files, all of which exist."""
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    found = [Path(path) for path in given]
    wrong = [path for path in found if not path.is_file()]
    problems = [f"'{path}' is {'a folder' if path.is_dir() else 'missing'}; expected a file" for path in wrong]
    raise_problems(problems or ([] if found else ["there is no file to read; give one or more"]), DataError)
    return found
