"""Files that commands write: whether they can be written is seen before minutes of work, not after."""

import json
from pathlib import Path
from typing import Any

from pipestill.draw.boxes import write_bytes
from pipestill.errors import ConfigError


def check_writable(path: str | None) -> None:
    """Raise `ConfigError` when there is no directory to write `path` into."""
    if path is not None and not Path(path).parent.is_dir():
        raise ConfigError(f"cannot write '{path}': there is no directory '{Path(path).parent}'")


def check_drawable(path: str | None) -> None:
    """Raise `ConfigError` when `path` cannot become a picture."""
    if path is not None and Path(path).suffix.lower() not in (".svg", ".png"):
        raise ConfigError(f"cannot draw '{path}': the name must end in .svg or .png")
    check_writable(path)


def write_json(path: str, value: Any) -> None:
    """Write a value as JSON, in one piece: the file is there whole or not at all."""
    write_bytes(Path(path), (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
