"""Arguments that a user gives are read, or refused with what was expected."""

import pytest

from pipestill.arguments import parse_bytes
from pipestill.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80GB", 80e9), ("1.5 MiB", 1.5 * 2**20), ("7", 7), (512, 512), ("2kb", 2000), ("3TiB", 3 * 2**40), ("9b", 9)],
)
def test_memory_is_read(text: object, expected: float) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "80XB", "0", True, None, "1 2"])
def test_what_is_no_memory_is_refused(text: object) -> None:
    with pytest.raises(ConfigError, match="expected memory such as 80GB or 512MiB"):
        parse_bytes(text)
