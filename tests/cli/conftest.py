import pytest

from pipestill import busy


@pytest.fixture(autouse=True)
def no_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stderr holds must not depend on how long a command takes."""
    monkeypatch.setattr(busy, "_PATIENCE_SECONDS", 3_600.0)
