"""Lines of a schedule's text: numbers, and yes or no."""

from __future__ import annotations

import re
from collections.abc import Iterable

Fields = dict[str, str]
"""The lines of a text: what stands before the colon, and what behind it. Readers take out the lines that they have read."""


def numbers(values: Iterable[int]) -> str:
    """Write numbers so that `parse_numbers` reads them."""
    return " ".join(map(str, values)) or "none"


def parse_numbers(key: str, fields: Fields) -> tuple[int, ...]:
    """Take out a line and read its whole numbers."""
    text = fields.pop(key)
    if text == "none":
        return ()
    if re.fullmatch(r"[0-9]{1,9}( +[0-9]{1,9})*", text) is None:
        raise ValueError(f"'{key}: {text}' in a schedule: expected whole numbers with spaces between, or 'none'")
    return tuple(map(int, text.split()))


def parse_number(key: str, fields: Fields) -> int:
    """Take out a line and read its one whole number."""
    text = fields.pop(key)
    if re.fullmatch("[0-9]{1,9}", text) is None:
        raise ValueError(f"'{key}: {text}' in a schedule: expected a whole number")
    return int(text)


def yes_or_no(truth: bool) -> str:
    """Write a truth value so that `parse_truth` reads it."""
    return "yes" if truth else "no"


def parse_truth(key: str, fields: Fields) -> bool:
    """Take out a line and read its yes or no."""
    text = fields.pop(key)
    if text not in ("yes", "no"):
        raise ValueError(f"'{key}: {text}' in a schedule: expected yes or no")
    return text == "yes"
