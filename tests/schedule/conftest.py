"""What tests of schedules share as fixtures."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def _short_search() -> Iterator[None]:
    """Fill's local search gives up early: what holds for every schedule holds for those that a longer search would improve."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipestill.schedule.pipeline.fill._MOVES", 2000)
        yield
