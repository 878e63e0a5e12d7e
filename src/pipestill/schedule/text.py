"""Lines of a schedule's text: numbers, and yes or no."""

import re
from collections.abc import Iterable

Fields = dict[str, str]
"""The lines of a text: what stands before the colon, and what behind it. Readers take out the lines that they have read."""


def numbers(values: Iterable[int]) -> str:
    """Write numbers so that `parse_numbers` reads them."""
    return " ".join(map(str, values)) or "none"


def parse_numbers(key: str, fields: Fields) -> tuple[int, ...]:
    """Take out a line and read its whole numbers."""
    text = _take(key, fields, "none|[0-9]{1,9}( +[0-9]{1,9})*", "whole numbers with spaces between, or 'none'")
    return () if text == "none" else tuple(map(int, text.split()))


def parse_number(key: str, fields: Fields) -> int:
    """Take out a line and read its one whole number."""
    return int(_take(key, fields, "[0-9]{1,9}", "a whole number"))


def pairs(values: Iterable[tuple[int, int]]) -> str:
    """Write pairs of numbers so that `parse_pairs` reads them."""
    return " ".join(f"{one}/{other}" for one, other in values) or "none"


def parse_pairs(key: str, fields: Fields) -> tuple[tuple[int, int], ...]:
    """Take out a line and read its pairs of whole numbers."""
    pair = "[0-9]{1,9}/[0-9]{1,9}"
    text = _take(key, fields, f"none|{pair}( +{pair})*", "pairs of whole numbers such as 0/1, with spaces between, or 'none'")
    return () if text == "none" else tuple((int(a), int(b)) for a, _, b in (word.partition("/") for word in text.split()))


def yes_or_no(truth: bool) -> str:
    """Write a truth value so that `parse_truth` reads it."""
    return "yes" if truth else "no"


def parse_truth(key: str, fields: Fields) -> bool:
    """Take out a line and read its yes or no."""
    return _take(key, fields, "yes|no", "yes or no") == "yes"


def _take(key: str, fields: Fields, pattern: str, expected: str) -> str:
    """Take out a line and return what it says; `ValueError` where that is not as `expected`."""
    text = fields.pop(key)
    if re.fullmatch(pattern, text) is None:
        raise ValueError(f"'{key}: {text}' in a schedule: expected {expected}")
    return text
