"""Names of strategies to compare."""

import pytest

from pipestill.compare.variants import variant
from pipestill.errors import ConfigError


def test_variants_of_fill() -> None:
    assert variant("1f1b") == ("1f1b", {})
    assert variant("fill+split+stale") == ("fill", {"split_backward": True, "staleness": 1})
    assert variant("torch-gpipe") == ("torch-gpipe", {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fil", "no strategy 'fil'.*did you mean 'fill'"),
        ("fill+x", "no variant 'fill+x'"),
        ("1f1b+split", "no variant"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("+", r"\+")):
        variant(name)
