"""What a teacher cache is of: written once into its folder, and compared with whatever wants to write or read it."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipestill.errors import DataError

_NAME = "cache.json"
_FORMAT = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Manifest:
    """The facts about a cache that all of its files share."""

    teacher: str
    """The hash of the teacher's weights and config."""
    tokenizer: str | None
    """The hash of its tokenizer; None where samples are no text."""
    k: int
    """How many logits are kept of each token."""
    dtype: str
    """The type in which logits and hidden states are kept."""
    temperatures: tuple[float, ...]
    """For which temperatures the tail's mass is kept."""
    vocabulary: int
    """How many logits the teacher has, or how many of them, the first ones, are read."""
    hidden: tuple[str, ...]
    """Which of the teacher's outputs are kept beside the logits."""

    def save(self, folder: Path) -> None:
        """Write it into the folder of a cache."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n"
        write_whole(folder / _NAME, text.encode())

    @classmethod
    def load(cls, folder: Path) -> "Manifest | None":
        """Read that of a folder; None where there is none. `DataError` for one that cannot be read."""
        path = folder / _NAME
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise DataError(f"'{path}' cannot be read: {error}; make the cache anew in another folder") from None
        if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
            raise DataError(f"'{path}' is of another version of pipestill, or no teacher cache; make the cache anew")
        try:
            made = cls(**values)
        except TypeError as error:
            raise DataError(f"'{path}' is no teacher cache ({error}); make the cache anew") from None
        lists = {name: tuple(getattr(made, name)) for name in ("temperatures", "hidden")}
        return cls(**{**asdict(made), **lists})

    def differences(self, other: "Manifest") -> Iterator[str]:
        """Yield what is different in a cache that is to be written, in words."""
        names = {"teacher": "another teacher", "tokenizer": "another tokenizer"}
        for name in asdict(self):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                yield f"it is of {names.get(name, f'{name} {mine}')}" + ("" if name in names else f", not {theirs}")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file such that it is there whole or not at all, also where the machine fails in between."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
