"""The directory of a run: its files are never half-written, and never replace those of another run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pipestill.errors import ConfigError


class RunDirectory:
    """The files of one run; the reference lists them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: str | None, recipe: str) -> RunDirectory:
        """Make `path`, or the first free `runs/<recipe>-<n>`; `ConfigError` when it holds something or cannot be made."""
        if path is None:
            number = 1
            while Path("runs", f"{recipe}-{number}").exists():
                number += 1
            chosen = Path("runs", f"{recipe}-{number}")
        else:
            chosen = Path(path)
        try:
            if chosen.exists() and (not chosen.is_dir() or any(chosen.iterdir())):
                raise ConfigError(f"run directory '{chosen}' is not empty; pass another --out, or remove it first")
            chosen.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make run directory '{chosen}': {error.strerror}; pass another --out") from None
        return cls(chosen)

    @classmethod
    def open(cls, path: str) -> RunDirectory:
        """Open the directory of a finished run; `ConfigError` where there is none."""
        if not Path(path, "summary.json").is_file():
            raise ConfigError(f"'{path}' is no finished run: it has no summary.json; pass the directory of one")
        return cls(Path(path))

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def inner(self, name: str) -> RunDirectory:
        """Make a directory of the same kind inside, for a training that is part of this run."""
        (self.path / name).mkdir(exist_ok=True)
        return RunDirectory(self.path / name)

    def write(self, name: str, content: str) -> None:
        """Write a text file in one piece: it is there whole or not at all."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            temporary.write_text(content)
            temporary.replace(target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON, as `write` does."""
        self.write(name, json.dumps(value, indent=2) + "\n")

    def read_json(self, name: str) -> Any:
        """Read a JSON file; `ConfigError` where it is missing or broken."""
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ConfigError(f"cannot read '{self.path / name}': {error}") from None

    def remove_if_untouched(self) -> None:
        """Remove the directory of a run that failed before it left anything but its config."""
        if {entry.name for entry in self.path.iterdir()} <= {"config.yaml"}:
            (self.path / "config.yaml").unlink(missing_ok=True)
            self.path.rmdir()
